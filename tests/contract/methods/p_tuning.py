from tests.contract.case import Case, Parity

_FOUR = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "encoder_hidden_size": 8}
_LSTM = {**_FOUR, "encoder_reparameterization_type": "LSTM"}
_PAIR = {**_FOUR, "task_type": "SEQ_2_SEQ_LM"}
CASES = (Case("P_TUNING", "mlp", _FOUR, ()), Case("P_TUNING", "lstm", _LSTM, ()))
PARITY: dict[str, Parity] = {}
PROMPTS = {
    "p-tuning": Parity("llama", "PromptEncoderConfig", _FOUR),
    "p-tuning by an LSTM": Parity("gpt2", "PromptEncoderConfig", _LSTM),
    "p-tuning by a deep LSTM": Parity("llama", "PromptEncoderConfig", {**_LSTM, "encoder_num_layers": 3}),
    "p-tuning classifier": Parity("classifier", "PromptEncoderConfig", {**_FOUR, "task_type": "SEQ_CLS"}),
    "p-tuning on BERT": Parity("bert", "PromptEncoderConfig", {**_FOUR, "task_type": "SEQ_CLS"}),
    "p-tuning on T5": Parity("t5", "PromptEncoderConfig", _PAIR),
    "p-tuning on BART": Parity("bart", "PromptEncoderConfig", _PAIR),
}
