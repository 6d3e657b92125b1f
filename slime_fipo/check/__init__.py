"""``slime-fipo check``: the preflight of a launch command, static, in a second, before a GPU is taken.

``command`` reads the command without slime, ``flag_rules`` and ``file_rules`` judge it, ``preflight`` puts the
effective recipe next to the paper's and prints what was found. What a launch script names by import path lives in
``recipes``.
"""
