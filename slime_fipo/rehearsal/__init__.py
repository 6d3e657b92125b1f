"""The whole of slime (``train.py``, Megatron-LM, SGLang, Ray) on a machine without a GPU, to see a run work end to end.

``site/`` puts the stand-ins into every process of a rehearsal and of nothing else; ``cpu_accelerator``,
``megatron_on_cpu`` and ``layer_spec`` are the stand-ins; ``cluster`` starts and ends the processes; ``demo`` trains the
embedded engine's task in slime. docs/rehearsal.md says what has been run where.
"""
