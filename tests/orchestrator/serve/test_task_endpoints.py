"""An endpoint is of one base and one task: which one a version goes to."""

import pytest

from orchestrator.errors import ServeError
from orchestrator.identity import base_identity
from orchestrator.registry import Registry
from orchestrator.serve.desired import Desired
from orchestrator.serve.endpoints import RayEndpoints
from orchestrator.serve.engines.heads import route_of


@pytest.fixture
def endpoints(tmp_path):
    return RayEndpoints(Registry(tmp_path / "registry"), local=True)


def test_each_task_of_a_base_has_an_endpoint_of_its_own(endpoints, tiny_base):
    base = base_identity(str(tiny_base))
    names = {
        "CAUSAL_LM": "tiny",
        "SEQ_CLS": "tiny-classify",
        "TOKEN_CLS": "tiny-token-classify",
        "QUESTION_ANS": "tiny-question-answering",
        "FEATURE_EXTRACTION": "tiny-embeddings",
    }
    for task, name in names.items():
        assert endpoints._choose(base, task, None) == name
        endpoints._registry.update_endpoint(
            name, lambda now, name=name, task=task: Desired(name, base, task=task).to_dict()
        )
    for task, name in names.items():
        assert endpoints._choose(base, task, None) == endpoints._choose(base, task, name) == name
        stored = endpoints._registry.endpoint_state(name)
        assert Desired.from_dict(stored).task == task


def test_an_endpoint_of_another_name_is_found_by_its_task(endpoints, tiny_base):
    base = base_identity(str(tiny_base))
    endpoints._registry.update_endpoint("mine", lambda now: Desired("mine", base, task="SEQ_CLS").to_dict())
    assert endpoints._choose(base, "SEQ_CLS", None) == "mine"
    assert endpoints._choose(base, "TOKEN_CLS", None) == "tiny-token-classify"


def test_a_version_of_another_task_is_refused_with_the_reason(endpoints, tiny_base):
    base = base_identity(str(tiny_base))
    endpoints._registry.update_endpoint("mine", lambda now: Desired("mine", base, task="SEQ_CLS").to_dict())
    with pytest.raises(ServeError) as refused:
        endpoints._choose(base, "CAUSAL_LM", "mine")
    assert str(refused.value) == (
        "deploy.endpoint: endpoint 'mine' has its base loaded for SEQ_CLS, and this adapter was trained for CAUSAL_LM: "
        "a base has one head. Deploy it to another endpoint (--endpoint NAME), or leave the name out."
    )


def test_what_was_stored_before_tasks_generates(tiny_base):
    stored = Desired("tiny", base_identity(str(tiny_base))).to_dict()
    del stored["task"]
    assert Desired.from_dict(stored).task == "CAUSAL_LM" and route_of("CAUSAL_LM") == "/v1/completions"
    assert route_of("SEQ_2_SEQ_LM") == "/v1/completions" and route_of("SEQ_CLS") == "/v1/classify"
