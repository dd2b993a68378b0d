"""Its weights come from a whole model's run, so the laws, which run one layer, have no case: see
tests/peft_dist/test_xlora.py."""

from tests.contract.case import Case

CASES = (Case("XLORA", "plain", {"hidden_size": 16, "adapters": {"a": "somewhere"}}, ()),)
PARITY: dict = {}
