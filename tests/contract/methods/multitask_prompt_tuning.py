from tests.contract.case import Case, Parity

_TASKS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2}
_ROWS = {"task_ids": [2, 0, 2]}
CASES = (Case("MULTITASK_PROMPT_TUNING", "random", _TASKS, ()),)
PARITY: dict[str, Parity] = {}
PROMPTS = {
    "multitask": Parity("llama", "MultitaskPromptTuningConfig", _TASKS, _ROWS),
    "multitask classifier": Parity(
        "classifier", "MultitaskPromptTuningConfig", {**_TASKS, "task_type": "SEQ_CLS"}, _ROWS
    ),
    "multitask on T5": Parity(
        "t5", "MultitaskPromptTuningConfig", {**_TASKS, "task_type": "SEQ_2_SEQ_LM"}, _ROWS
    ),
    "multitask on BART": Parity(
        "bart", "MultitaskPromptTuningConfig", {**_TASKS, "task_type": "SEQ_2_SEQ_LM"}, _ROWS
    ),
}
