"""Token records: what the loss saw of a response, token by token, at one optimizer step.

The contract between whoever writes records (``plugin``, ``local``) and whoever reads them (``report``); it belongs to
neither. ``schema`` says what a record holds, ``store`` writes and reads its files; ``arguments``, ``choice`` and
``packed`` are for the writers. ``slime_dump`` makes records of what slime itself dumps, ``text`` shows token ids as
text. Nothing here knows a page.
"""

from .schema import FATES, Fate, StepHeader, TokenRecord
from .store import RecordSet, read_records, step_file, write_step

__all__ = ["FATES", "Fate", "RecordSet", "StepHeader", "TokenRecord", "read_records", "step_file", "write_step"]
