"""The short form of torture.py, and that it would see what it looks for."""

from pathlib import Path

import pytest
from torture import DAMAGES, Lost, Outcome, Torture, table


@pytest.mark.slow
@pytest.mark.torture
def test_a_few_faults_and_none_is_lost(tmp_path: Path) -> None:
    torture = Torture(tmp_path, seed=3)
    outcomes = list(torture.run(5))
    assert [outcome.lost for outcome in outcomes if outcome.lost] == [], table(outcomes)
    assert len({outcome.kind for outcome in outcomes}) >= 4
    # That it sees a file that differs, one that is missing, and a lock that does.
    file = torture.root / "models" / "retro" / "config.json"
    for how in DAMAGES:
        content = file.read_bytes()
        torture.damage(file, how)
        with pytest.raises(Lost, match=r"other files than undisturbed: models/retro/config.json$"):
            torture.compare()
        file.write_bytes(content)
    torture.compare()
    lock = torture.root / "dvc.lock"
    lock.write_text(lock.read_text().replace("stage", "stage", 1).replace("size: ", "size: 1", 1))
    with pytest.raises(Lost, match=r"another dvc.lock"):
        torture.compare()


def test_the_table_counts() -> None:
    outcomes = [
        Outcome("kill", "chunk", "ran chunk"),
        Outcome("kill", "embed", 'said "delete train"; then ran embed'),
        Outcome("bit rot", "knn", "", lost="a traceback"),
    ]
    rows = [line.split() for line in table(outcomes).splitlines()[2:]]
    assert rows == [["bit", "rot", "1", "0", "0", "1"], ["kill", "2", "1", "1", "0"], ["all", "3", "1", "1", "1"]]
