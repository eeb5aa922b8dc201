"""The pipeline: one module a stage, run by DVC. They never import each other: artifacts are how they speak."""
