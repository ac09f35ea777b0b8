"""lm-eval over HTTP: with its tokenizer on the server, the figures are those of the same tasks on the model itself."""

import pytest

pytest.importorskip("lm_eval", reason="pip install 'lm-eval[api]' datasets: the client that is tried here")
pytest.importorskip("datasets", reason="pip install 'lm-eval[api]' datasets: the client that is tried here")
pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]' datasets: the client that is tried here")
import lm_eval
from lm_eval.tasks import TaskManager

from atma.eval.eleuther import AtmaLM
from tests.eval.test_tasks import KINDS
from tests.eval.test_tasks import folder as tasks  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RELATIVE = 1e-3  # of log-likelihoods in float32, summed in two orders


def test_figures_over_http_are_those_of_the_model_itself(live, tasks, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    there = {"base_url": f"{live.url}/v1/completions", "model": "tiny", "tokenizer_backend": "remote", "max_retries": 1}
    here = {"pretrained": live.service.path, "device": "cpu", "add_bos_token": False}
    models = {"local-completions": there, AtmaLM.create_from_arg_obj(here): None}
    names = [f"local_{kind}" for kind in KINDS]
    told, own = (
        lm_eval.simple_evaluate(model, model_args=given, tasks=names, task_manager=manager, bootstrap_iters=0)
        for model, given in models.items()
    )
    for name in names:
        for figure, value in own["results"][name].items():
            if isinstance(value, float):
                assert told["results"][name][figure] == pytest.approx(value, rel=RELATIVE), (name, figure)


def test_chats_are_written_to(live, tasks, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    there = {"base_url": f"{live.url}/v1/chat/completions", "model": "tiny", "max_retries": 1}
    asked = {"tasks": ["local_written"], "task_manager": manager, "apply_chat_template": True, "bootstrap_iters": 0}
    told = lm_eval.simple_evaluate("local-chat-completions", model_args=there, **asked)
    assert told["results"]["local_written"]
