"""The reference trainer for on-policy self-distillation, one file per idea. Start with loop.py.

The method: loop.py, step.py, objective.py, batch.py, teacher.py, contexts.py, on the records of types.py.
Around it: config/ (settings), models/, sampling/, envs/ (problems and verifiers), distributed/ (ranks and
shards), records/ (files of a run) and studies/ (experiments: reproduce, probe and discover).
"""
