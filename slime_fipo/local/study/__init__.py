"""``slime-fipo compare``: arms that differ in one thing, paired seed by seed, and what their differences can tell.

``arms`` says what is compared, ``runner`` runs it on all cores, ``statistics`` turns paired differences into effects,
``results`` writes and draws them, ``command`` is the command line. A run itself is ``slime_fipo.local.engine``'s.
"""
