"""First on PYTHONPATH, it makes one stage fail at one exact point: the n-th time that it opens or changes a file.

Python imports it at its start. RETRO_FAULT holds JSON: the stage, the point, what happens there, and a folder
in which a file `reached` says that it did, and `steps-STAGE` how many points an undisturbed run has. What is
counted are audit events (sys.addaudithook) on the files that the pipeline writes, so that a fault lands
between the same two operations on a slow machine as on a quick one.
"""

import atexit
import errno
import json
import os
import resource
import shutil
import signal
import sys
import time

FILES = ("data", "models", "metrics", "plots", "reports", ".retro", "mlartifacts")
CHANGES = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Fault:
    """What happens to this process, and when."""

    def __init__(self, stage, folder, action="none", point=0, limit=None, target=None):
        self.stage, self.folder, self.action, self.point, self.target = stage, folder, action, point, target
        self.home = os.path.realpath(os.getcwd())
        self.steps = 0
        self.busy = self.failing = False
        if action == "interrupt":  # whoever runs in a shell's background inherits deaf ears
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.addaudithook(self.see)
        if limit is None:
            atexit.register(self.tell)
        else:
            self.mark("reached")
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def see(self, event, arguments):
        """Count a step on the pipeline's files; at the point, act."""
        if self.busy or not (event == "open" or event in CHANGES):
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        self.busy = True
        try:
            self.step(event, os.path.relpath(os.path.join(os.getcwd(), os.fsdecode(path)), self.home), arguments)
        finally:
            self.busy = False

    def step(self, event, path, arguments):
        """One operation on `path`, which is relative to the project."""
        if path.split(os.sep)[0] not in FILES:
            return
        adds = event in ("os.mkdir", "os.link") or (event == "open" and (arguments[2] or 0) & WRITES)
        if self.failing and self.action == "disk full" and adds:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.action == "inputs read-only" and (adds or event in CHANGES) and self.inside(path):
            self.mark("reached")
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        self.steps += 1
        if self.steps == self.point:
            self.mark("reached")
            self.act()

    def inside(self, path):
        """Whether `path` is one of the stage's inputs."""
        return any(path == place or path.startswith(place + os.sep) for place in self.target)

    def act(self):
        """What happens at the point."""
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "kill everything":
            os.killpg(0, signal.SIGKILL)
        elif self.action == "interrupt":
            os.killpg(0, signal.SIGINT)
        elif self.action == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.action == "input vanishes":
            shutil.rmtree(self.target)
        elif self.action == "disk full":
            self.failing = True
        elif self.action == "wait":
            while not os.path.exists(os.path.join(self.folder, "go")):
                time.sleep(0.01)

    def mark(self, name, text=""):
        """Leave a file for the program that sent the fault."""
        with open(os.path.join(self.folder, name), "w") as stream:
            stream.write(text)

    def tell(self):
        """At the end: how many steps there were."""
        self.busy = True
        self.mark(f"steps-{self.stage}", str(self.steps))


if "RETRO_FAULT" in os.environ and sys.orig_argv[1:2] == ["-m"]:
    _fault = json.loads(os.environ["RETRO_FAULT"])
    _stage = sys.orig_argv[2].removeprefix("stages.")
    if sys.orig_argv[2] == f"stages.{_stage}" and _fault.get("stage") in (_stage, "every"):
        Fault(**{**_fault, "stage": _stage})
