"""lm_eval on the engine: its own tasks, on a tiny model, with nothing fetched from anywhere."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tests.tiny import SHAPE, tiny_model, tiny_modulator
from vesicle.errors import VesicleError

pytest.importorskip("lm_eval")

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
END = "</s>"
TEMPLATE = (
    "{{ '<' }}{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
NATS = 1e-4  # transformers normalises in fp32, whatever the model's own format is
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def write_tokenizer(folder: Path) -> None:
    """One token a character, and one that ends a text: as many as the tiny model knows."""
    vocabulary = {END: 0} | {c: i + 1 for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", dtype=torch.float32).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def modulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A modulator's folder."""
    path = tmp_path_factory.mktemp("modulator")
    tiny_modulator(SHAPE, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference() -> Any:
    """The model as transformers runs it, with the same weights."""
    return tiny_model("llama", dtype=torch.float32).double()


@pytest.fixture(scope="module")
def dense(folder: Path) -> Any:
    return make(folder, modulator="none")


def make(folder: Path, **settings: Any) -> Any:
    from vesicle.integrations.lm_eval.model import VesicleLM

    return VesicleLM(model=str(folder), weights="fp64", **settings)


def ids_of(text: str) -> list[int]:
    return [CHARACTERS.index(c) + 1 for c in text]


def text_of(ids: list[int]) -> str:
    return "".join(CHARACTERS[i - 1] for i in ids)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    kind = "generate_until" if isinstance(arguments[0][-1], dict) else "loglikelihood"
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def hf_logits(reference: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return reference(input_ids=torch.tensor([ids])).logits[0]


def hf_score(reference: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Computed directly: log-likelihood in nats, and whether greedy decoding would write it.

    Blanks at the end of the context belong to the continuation.
    """
    blanks = context[len(context.rstrip()) :]
    context, continuation = context.rstrip(), blanks + continuation
    ids = (ids_of(context) or [0]) + ids_of(continuation)
    logits = hf_logits(reference, ids)[-len(continuation) - 1 : -1]
    labels = torch.tensor(ids_of(continuation))
    nats = logits.log_softmax(-1).gather(1, labels[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == labels).all())


def hf_greedy(reference: Any, context: str, n: int) -> str:
    ids = ids_of(context)
    for _ in range(n):
        ids.append(int(hf_logits(reference, ids)[-1].argmax()))
        assert ids[-1] != 0, "choose a context after which the tiny model does not end its text"
    return text_of(ids[len(context) :])


PAIRS = [
    ("Once upon", " a time"),
    ("Once upon ", "a time"),  # the blank goes to the continuation
    (LONG * 3, "yes"),
    (LONG * 3, "no, not at all, because the age of wisdom is past"),
    (LONG * 3, "y"),
    (LONG * 3, "n"),
    (LONG * 3 + "ye", "s"),  # reads what (..., "yes") reads
    (LONG * 2 + "But", " it was"),
    ("", "alone"),
    ("x", LONG * 3),
]


def test_loglikelihoods_are_those_of_transformers(dense: Any, reference: Any):
    found = dense.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    expected = [hf_score(reference, *pair) for pair in PAIRS]
    assert [nats for nats, _ in found] == pytest.approx([n for n, _ in expected], abs=NATS)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_greedy_decoding_would_write_is_told(dense: Any, reference: Any):
    context = LONG.rstrip()
    likely = hf_greedy(reference, context, 5)
    unlikely = likely[:4] + ("a" if likely[4] != "a" else "b")
    pairs = [(context, likely), (context, unlikely), (context, likely[:1])]
    assert [g for _, g in dense.loglikelihood(requests(*pairs), disable_tqdm=True)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(("phase", "most"), [("all", 0.6), (None, 0.65)])
def test_shared_beginnings_change_no_score_and_are_read_once(
    folder: Path, modulator: Path, phase: str | None, most: float
):
    """Where prompts rest, texts share less: what is prompt to one is scored in another."""
    lm = make(folder, modulator=str(modulator), budget=0.5, phase=phase)
    together = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    tokens = lm.scoring.tokens
    apart = [lm.loglikelihood(requests(pair), disable_tqdm=True)[0] for pair in PAIRS]
    assert [nats for nats, _ in together] == pytest.approx([n for n, _ in apart], abs=1e-6)
    assert [g for _, g in together] == [g for _, g in apart]
    assert tokens < most * (lm.scoring.tokens - tokens)


def test_predictors_with_state_share_no_beginnings(folder: Path, tmp_path: Path):
    tiny_modulator(SHAPE, "recurrent", dtype=torch.float32).save_pretrained(tmp_path)
    lm = make(folder, modulator=str(tmp_path), budget=0.5)
    # Groups that begin like the one before, beside texts of one group.
    pairs = [*PAIRS, *((f"{LONG * 4}{n} {LONG * 2}", "yes") for n in "123")]
    together = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    apart = [lm.loglikelihood(requests(pair), disable_tqdm=True)[0] for pair in pairs]
    assert [nats for nats, _ in together] == pytest.approx([n for n, _ in apart], abs=1e-6)
    assert lm.engine.pool.blocks_in_use == 0


def test_few_shot_prompts_are_read_once_and_each_question_once(folder: Path, dense: Any):
    shots = [LONG * 4 + f"{n} Question number {n}, {LONG}" for n in "123"]
    pairs = [(shot, choice) for shot in shots for choice in ("yes", "no", "perhaps")]
    lm = make(folder, modulator="none")
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    expected = [dense.loglikelihood(requests(pair), disable_tqdm=True)[0] for pair in pairs]
    assert [n for n, _ in found] == pytest.approx([n for n, _ in expected], abs=1e-8)
    once = len(LONG) * 4 + 3 * (len(shots[0]) - len(LONG) * 4)
    assert lm.scoring.tokens <= once + len(pairs) * 64
    assert lm.engine.pool.blocks_in_use == 0


def test_answers_reach_lm_evals_cache(folder: Path):
    lm, kept = make(folder, modulator="none"), []

    class Hook:
        def add_partial(self, *parts: Any) -> None:
            kept.append(parts)

    lm.set_cache_hook(Hook())
    how = {"until": ["e"], "max_gen_toks": 3}
    scored = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    total = lm.loglikelihood_rolling(requests((LONG,)), disable_tqdm=True)
    written = lm.generate_until(requests((LONG, how)), disable_tqdm=True)
    pairs = {key: answer for kind, key, answer in kept if kind == "loglikelihood"}
    assert [pairs[pair] for pair in PAIRS] == scored
    assert ("loglikelihood_rolling", (LONG,), total[0]) in kept
    assert ("generate_until", (LONG, how), written[0]) in kept


def test_decisions_are_active_in_scores_and_texts(folder: Path, modulator: Path, dense: Any):
    pairs = requests(*PAIRS)
    task = requests((LONG, {"until": [], "max_gen_toks": 20}))
    resting = make(folder, modulator=str(modulator), budget=1)
    sparing = make(folder, modulator=str(modulator), budget=0.3)
    scores = {
        name: torch.tensor([nats for nats, _ in lm.loglikelihood(pairs, disable_tqdm=True)])
        for name, lm in {"dense": dense, "resting": resting, "sparing": sparing}.items()
    }
    torch.testing.assert_close(scores["resting"], scores["dense"])
    assert ((scores["sparing"] - scores["dense"]).abs() > 1e-3).all()
    texts = [lm.generate_until(task, disable_tqdm=True) for lm in (dense, resting, sparing)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    about = sparing.get_model_info()["vesicle"]
    assert about["budget"] == 0.3
    for phase in ("scoring", "generation"):
        assert about[phase]["share"]["flops"] < 0.9
        assert about[phase]["executed"]["flops_modulator"] > 0
    about = resting.get_model_info()["vesicle"]
    modulators = about["scoring"]["executed"]["flops_modulator"]
    executed, dense_cost = about["scoring"]["executed"], about["scoring"]["dense"]
    assert executed["flops_total"] - modulators == dense_cost["flops_total"]


def test_rolling_windows_score_each_token_once(folder: Path, reference: Any):
    text, window = (LONG * 2)[:130], 50
    lm = make(folder, modulator="none", max_length=window)
    ids = [0, *ids_of(text)]
    expected, done = 0.0, 0
    while done < len(text):
        end = min(done + window, len(text))
        inputs = ids[max(0, end - window) : end]
        logits = hf_logits(reference, inputs)[-(end - done) :].log_softmax(-1)
        expected += float(logits.gather(1, torch.tensor(ids[done + 1 : end + 1])[:, None]).sum())
        done = end
    found = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert found == pytest.approx([expected], abs=NATS)


def test_a_long_context_loses_its_beginning(folder: Path, reference: Any):
    lm = make(folder, modulator="none", max_length=64)
    found = lm.loglikelihood(requests((LONG * 3, "yes")), disable_tqdm=True)[0]
    kept = (LONG * 3 + "yes")[-65:]
    assert found[0] == pytest.approx(hf_score(reference, kept[:-3], "yes")[0], abs=NATS)


def test_the_head_runs_for_the_positions_that_are_scored(folder: Path):
    lm = make(folder, modulator="none")
    lm.loglikelihood(requests((LONG * 3, "yes")), disable_tqdm=True)
    per_position = 2 * SHAPE.width * SHAPE.vocabulary
    # The blank that the context ends with is scored with what follows, as lm_eval has it.
    assert lm.scoring.executed.flops_head == len(" yes") * per_position


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_end_at_stop_strings_tokens_and_limits(folder: Path, reference: Any, batch_size: int):
    lm = make(folder, modulator="none", batch_size=batch_size)
    whole = hf_greedy(reference, LONG, 12)
    stop = whole[5:7]
    end = whole.index(stop)
    found = lm.generate_until(
        requests(
            (LONG, {"until": [], "max_gen_toks": 12}),
            (LONG, {"until": [stop, "never there"], "max_gen_toks": 12}),
            (LONG, {"until": stop, "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}),
            (LONG, {"until": [END], "max_gen_toks": 3}),
            (LONG[:9], {"until": [], "max_new_tokens": 4, "top_k": 50, "num_beams": 1}),
        ),
        disable_tqdm=True,
    )
    assert found == [whole, whole[:end], whole[:end], whole[:3], hf_greedy(reference, LONG[:9], 4)]
    assert lm.engine.pool.blocks_in_use == 0


def test_a_text_that_is_stopped_costs_no_more(folder: Path, reference: Any):
    whole = hf_greedy(reference, LONG, 12)
    tokens = []
    for until in ([], [whole[2:4]]):
        lm = make(folder, modulator="none")
        lm.generate_until(requests((LONG, {"until": until, "max_gen_toks": 12})), True)
        tokens.append(lm.generation.tokens)
    assert tokens[0] == len(LONG) + 11  # the last one is not fed back
    assert tokens[1] <= len(LONG) + whole.index(whole[2:4]) + 1


def test_sampled_texts_differ_by_place_and_repeat_by_seed(folder: Path):
    how = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    again = [
        make(folder, modulator="none", seed=seed).generate_until(requests((LONG, how), (LONG, how)))
        for seed in (3, 3, 40)
    ]
    assert again[0] == again[1]
    assert again[0] != again[2]
    assert again[0][0] != again[0][1]


def test_chat_templates(dense: Any):
    chat = [{"role": "user", "content": "Hi"}]
    assert dense.apply_chat_template(chat) == "<u:Hi|a:"
    opened = [*chat, {"role": "assistant", "content": "We"}]
    assert dense.apply_chat_template(opened, add_generation_prompt=False).startswith("<u:Hi|a:We")
    assert dense.chat_template(True) == TEMPLATE


def write_tasks(folder: Path) -> Path:
    rows = [
        {"question": f"{LONG}What is {n}? ", "options": ["one", "two", "three"], "answer": n % 3}
        for n in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}, "
        f"cache_dir: {folder / 'cache'}}}\n"
        "test_split: test\ndoc_to_text: '{{question}}'\n"
    )
    (folder / "choose.yaml").write_text(
        f"task: tiny_choose\n{common}output_type: multiple_choice\n"
        "doc_to_choice: '{{options}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "write.yaml").write_text(
        f"task: tiny_write\n{common}output_type: generate_until\n"
        "doc_to_target: '{{options[answer]}}'\n"
        "generation_kwargs: {until: ['e'], max_gen_toks: 7}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


def evaluate(
    monkeypatch: pytest.MonkeyPatch, tasks: Path, arguments: dict[str, Any], **settings: Any
) -> Any:
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    import vesicle.evaluation.lm_eval  # noqa: F401 - registers the model

    # It runs the system's package tools for seconds to describe the machine.
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model="vesicle",
        model_args=arguments,
        tasks=["tiny_choose", "tiny_write"],
        task_manager=manager,
        bootstrap_iters=0,
        **settings,
    )


def test_lm_eval_runs_tasks(
    folder: Path,
    modulator: Path,
    reference: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    tasks = write_tasks(tmp_path)
    shared = {"model": str(folder), "weights": "fp64"}
    dense = evaluate(monkeypatch, tasks, {**shared, "modulator": "none"}, limit=4)
    spent = {**shared, "modulator": str(modulator), "budget": 0.3}
    sparing = evaluate(monkeypatch, tasks, spent, limit=4)

    json.dumps(sparing["config"])
    scoring = sparing["config"]["vesicle"]["scoring"]
    assert scoring["generated_share"] < 0.9
    assert scoring["generated_share"] < scoring["share"]["flops"] < 1  # prompts rest
    assert sparing["config"]["vesicle"]["generation"]["tokens"] > 0
    assert dense["config"]["vesicle"]["modulator"] == "none"
    for sample in dense["samples"]["tiny_choose"]:
        # lm_eval puts one blank before a choice.
        text = sample["doc"]["question"]
        expected = [hf_score(reference, text, f" {o}") for o in sample["doc"]["options"]]
        found = [answer[0] for answer in sample["filtered_resps"]]
        assert found == pytest.approx([nats for nats, _ in expected], abs=NATS)
        best = max(range(3), key=lambda i: expected[i][0])
        assert sample["acc"] == float(best == sample["doc"]["answer"])
    pairs = zip(dense["samples"]["tiny_write"], sparing["samples"]["tiny_write"], strict=True)
    for sample, other in pairs:
        written = sample["filtered_resps"][0]
        assert written == hf_greedy(reference, sample["doc"]["question"], 7).split("e")[0]
        assert "e" not in other["filtered_resps"][0]
    scores = [
        [s["filtered_resps"] for s in run["samples"]["tiny_choose"]] for run in (dense, sparing)
    ]
    assert scores[0] != scores[1]


def test_chats_and_examples_go_through_lm_eval(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shared = {"model": str(folder), "weights": "fp64", "modulator": "none"}
    tasks = write_tasks(tmp_path)
    result = evaluate(monkeypatch, tasks, shared, limit=2, apply_chat_template=True, num_fewshot=1)
    asked = result["samples"]["tiny_write"][0]["arguments"][0][0]
    assert asked.startswith("<u:")
    assert asked.count("|a:") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1.5}, "budget is 1.5; allowed: above 0, up to 1"),
        ({"budget": "lots"}, "budget is 'lots'; allowed: a number"),
        ({"budget": 0.5}, "no modulator is shipped for this model"),
        ({"budget": 0.5, "modulator": "none"}, "without a modulator only 1 is allowed"),
        ({"modulator": "/no/such/folder"}, "no modulator at '/no/such/folder'"),
        ({"budgt": 0.5}, "unknown model argument 'budgt' (did you mean budget?)"),
        ({"threads": 0}, "threads is 0; allowed: whole numbers, 1 and above"),
        ({"max_length": 9999}, "max_length is 9999; allowed: whole numbers, 2 to 512"),
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many'"),
        ({"batch_size": 0}, "batch_size is 0; allowed: whole numbers, 1 to 256"),
        ({"pretrained": "other"}, "model and pretrained are both given"),
        ({"weights": "int3"}, "int3"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    folder: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    from vesicle.integrations.lm_eval.model import VesicleLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VesicleError) as caught:
        VesicleLM(**{"model": str(folder), **settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 4}, "num_beams is 4; allowed: 1"),
        ({"temprature": 1.0}, "unknown generation argument 'temprature' (did you mean temperature"),
        ({"max_gen_toks": 512}, "max_gen_toks is 512; allowed: whole numbers, 1 to 511"),
        ({"do_sample": True, "top_p": 3}, "top-p is 3"),
        ({"do_sample": True, "top_k": 9}, "top_k is 9"),
    ],
)
def test_bad_generation_arguments_are_refused(dense: Any, how: dict[str, Any], message: str):
    with pytest.raises(VesicleError, match=message.replace("(", r"\(")):
        dense.generate_until(requests((LONG, {"until": [], **how})), disable_tqdm=True)


def test_a_continuation_longer_than_the_window_is_refused(folder: Path):
    lm = make(folder, modulator="none", max_length=10)
    with pytest.raises(VesicleError, match="a continuation has 79 tokens; allowed: 10"):
        lm.loglikelihood(requests(("x", LONG)), disable_tqdm=True)


def test_the_command_line(
    folder: Path,
    modulator: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    import lm_eval.tasks
    from lm_eval import evaluator

    from vesicle.evaluation.lm_eval import main

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    # Reading the thousands of stock tasks takes half a minute.
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    tasks = write_tasks(tmp_path)
    arguments = ["--model", "vesicle", "--tasks", str(tasks / "choose.yaml"), "--limit", "2"]
    model = f"model={folder},modulator={modulator},weights=fp64,threads=1"
    before = list(sys.argv)
    assert main([*arguments, "--model_args", f"{model},budget=0.5"]) == 0
    assert "tiny_choose" in capsys.readouterr().out
    assert main([*arguments, "--model_args", f"{model},budget=7"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "vesicle: error: budget is 7; allowed: above 0, up to 1"
    assert sys.argv == before
