"""FIPO inside unmodified slime: its flags in slime's parser, its weights in slime's Megatron policy loss.

``arguments`` settles what a run's settings are, with ``values``, ``config_files`` and ``spelling``; none of them needs
slime. ``parser`` puts them into slime's parser, ``loss`` imports slime and megatron-core; it warns of ``engine_noise``
and hands what it saw to ``recorder`` and ``tracker``. ``preemption`` saves on SIGTERM, ``patch`` builds FIPO into a
checkout of slime. Imports go one way: parser, loss, arguments.
"""
