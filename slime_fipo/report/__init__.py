"""``slime-fipo report``: what FIPO did, in one HTML file that needs neither a server nor a network.

``inputs`` finds runs and records, ``selection`` chooses what goes in, ``statistics`` sums up what was recorded,
``text`` makes token ids readable, ``page`` writes the file from ``assets/`` (template, style, scripts), ``terminal``
prints one response. ``metrics``, ``picture`` and ``summary`` show a run of the embedded engine.
"""
