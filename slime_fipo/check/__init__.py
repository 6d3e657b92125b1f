"""``slime-fipo check``: the preflight of a launch command, before a GPU is taken.

``command`` reads the command without slime, ``flag_rules``, ``reward_rules`` and ``file_rules`` judge it in a second;
``slime_parser`` asks slime's own parser, in a process of its own, where there is one. ``preflight`` puts the effective
recipe next to the paper's and prints what was found. What a launch script names by import path lives in
``recipes``.
"""
