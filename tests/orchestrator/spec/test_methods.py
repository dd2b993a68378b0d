import json

from orchestrator.spec.adapter import method_names
from orchestrator.spec.methods import method_rows


def test_rows_tell_what_a_method_is():
    rows = {row.name: row for row in method_rows()}
    assert list(rows) == method_names()
    lora = rows["lora"]
    assert (
        lora.paper == "2106.09685" and lora.merges and "arXiv" not in lora.what and "CAUSAL_LM" in lora.tasks
    )
    fields = {field.name: field for field in lora.fields}
    assert fields["r"].default == 8 and fields["r"].takes == "a whole number" and fields["r"].help
    assert fields["lora_alpha"].aliases == ("alpha",) and fields["target_modules"].default == "all-linear"
    assert not rows["prompt_tuning"].merges


def test_rows_are_json():
    rows = json.loads(json.dumps([row.to_dict() for row in method_rows()]))
    assert rows[0]["name"] == "lora" and rows[0]["fields"][0]["name"] == "r"
