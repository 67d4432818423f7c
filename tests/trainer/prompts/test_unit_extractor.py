"""Text units from chat models that answer well, badly or not at all; their cache; and star-units."""

from __future__ import annotations

import csv
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from star_trainer.config import ConfigError, Units, describe_keys, load_config
from star_trainer.config.paths import TINY_PIPELINE
from star_trainer.prompts import Prompt, read_prompts
from star_trainer.prompts.units import UnitExtractor, chat
from star_trainer.prompts.units.cache import CacheError, UnitCache
from star_trainer.rewards.terms import unsuitable
from star_trainer.studies.units import main
from star_trainer.worlds.requirements import DetectedObject, judge

from tests.trainer.local_server import local_server, send

PROMPTS = ["a red cup on a table", 'a sign that says "Go"']
GOOD = '[["red cup", "table"], ["Go", "sign"]]'


class Script:
    """A chat model that gives prepared answers, one after the other, and remembers what it was asked."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[list[chat.Message]] = []

    def __call__(self, messages: list[chat.Message]) -> str:
        self.asked.append(messages)
        return self.answers.pop(0)


def test_a_good_answer_is_taken_as_it_is() -> None:
    script = Script(GOOD)
    assert chat.ask(script, PROMPTS, "ocr", retries=2) == [["red cup", "table"], ["Go", "sign"]]
    (messages,) = script.asked
    assert [message["role"] for message in messages] == ["system", "user"]
    assert json.loads(messages[1]["content"]) == PROMPTS


MALFORMED = {
    "prose": "Here are the units: red cup",
    "a code fence": f"```json\n{GOOD}\n```",
    "an object": '{"units": []}',
    "too few": '[["red cup"]]',
    "too many": '[["red cup"], ["Go"], ["x"]]',
    "no strings": '[["red cup"], [1]]',
    "no arrays": '["red cup", "Go"]',
    "nothing": "",
    "cut off": '[["red cup", "tab',
    "trailing words": GOOD + " I hope this helps!",
    "deep nesting": "[" * 100_000,
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_answer_is_complained_about_and_asked_for_again(kind: str) -> None:
    script = Script(MALFORMED[kind], GOOD)
    assert chat.ask(script, PROMPTS, "general", retries=1) == [["red cup", "table"], ["Go", "sign"]]
    assert script.asked[1][-1]["role"] == "user"
    assert "not the array" in script.asked[1][-1]["content"]


@pytest.mark.parametrize("kind", MALFORMED)
def test_an_answer_that_stays_malformed_gives_nothing(kind: str) -> None:
    assert chat.ask(Script(*[MALFORMED[kind]] * 3), PROMPTS, "general", retries=2) == [None, None]


def test_what_is_not_in_the_prompt_is_refused_and_named() -> None:
    script = Script('[["red cup", "saucer"], ["Go"]]', '[["red cup"], ["Stop"]]')
    # The second prompt's first answer was usable, and stays.
    assert chat.ask(script, PROMPTS, "general", retries=1) == [["red cup"], ["Go"]]
    assert "saucer" in script.asked[1][-1]["content"]


def test_a_prompt_without_a_phrase_is_asked_for_again() -> None:
    script = Script('[[], ["Go"]]', GOOD)
    assert chat.ask(script, PROMPTS, "general", retries=1) == [["red cup", "table"], ["Go"]]


@pytest.mark.parametrize("task", chat.TASKS)
def test_the_instruction_says_what_to_list_and_in_which_form(task: str) -> None:
    text = chat.instruction(task)
    assert "JSON array" in text and "letter by letter" in text
    assert ("rendered text" in text) == (task == "ocr")
    assert ("spatial relation" in text) == (task == "geneval")


Reply = Callable[[dict[str, Any], int], tuple[int, bytes]]


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], tuple[str, list[dict[str, Any]]]]]:
    """Start an endpoint that answers by a function of the request and its number; gives its address and its log."""
    with ExitStack() as servers:

        def start(reply: Reply) -> tuple[str, list[dict[str, Any]]]:
            requests: list[dict[str, Any]] = []

            def answer(handler: BaseHTTPRequestHandler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                requests.append({"path": handler.path, "key": handler.headers.get("Authorization"), **body})
                send(handler, *reply(body, len(requests)))

            return servers.enter_context(local_server(answer)) + "/v1", requests

        yield start


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def settings(**options: Any) -> Units:
    return Units(**{"source": "llm", "model": "small", "cache": None, **options})


def prompts() -> list[Prompt]:
    return [Prompt(text, {}) for text in PROMPTS]


def test_an_endpoint_is_asked_as_openai_is(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    address, requests = serve(lambda body, number: (200, completion(GOOD)))
    extractor = UnitExtractor(settings(endpoint=address, key_variable="MY_KEY", task="ocr"))
    extractions = extractor(prompts())
    assert [(e.units, e.source) for e in extractions] == [(("red cup", "table"), "llm"), (("Go", "sign"), "llm")]
    (request,) = requests
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer s3cret"
    assert request["model"] == "small" and request["temperature"] == 0


def test_prompts_with_unusable_answers_get_the_rules_and_are_counted(serve) -> None:
    address, _ = serve(lambda body, number: (200, completion('[["red cup"], ["Halt"]]')))
    extractor = UnitExtractor(settings(endpoint=address, retries=1))
    first, second = extractor(prompts())
    assert (first.units, first.source) == (("red cup",), "llm")
    assert (second.units, second.source) == (("Go", "sign"), "rules for llm")
    assert extractor.replaced == 1


def test_an_endpoint_that_recovers_costs_a_retry(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)
    address, requests = serve(lambda body, number: (503, b"busy") if number < 3 else (200, completion(GOOD)))
    assert len(UnitExtractor(settings(endpoint=address))(prompts())) == 2
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("status", "content", "message", "count"),
    [
        (500, b"broken", "status 500", 4),
        (401, b"no key", "status 401", 1),
        (200, b"<html>", "no chat completion", 1),
        (200, b'{"choices": []}', "no chat completion", 1),
        (200, b'{"choices": [{"message": {"content": null}}]}', "no text", 1),
    ],
)
def test_an_endpoint_that_does_not_answer_is_named(
    serve, monkeypatch: pytest.MonkeyPatch, status: int, content: bytes, message: str, count: int
) -> None:
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)
    address, requests = serve(lambda body, number: (status, content))
    with pytest.raises(chat.ChatError, match=f"units.endpoint: {address}.*{message}"):
        UnitExtractor(settings(endpoint=address))(prompts())
    assert len(requests) == count


def test_a_dead_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)
    with pytest.raises(chat.ChatError, match=r"units.endpoint: http://127.0.0.1:9/v1"):
        UnitExtractor(settings(endpoint="http://127.0.0.1:9/v1", timeout=1.0))(prompts())


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a Llama of random weights and a tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("chat") / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_chat_model_of_transformers_is_run(chat_model: str) -> None:
    talker = chat.TransformersChat(chat_model, max_new_tokens=5)
    answer = talker([{"role": "user", "content": "hello"}])
    assert isinstance(answer, str) and answer == talker([{"role": "user", "content": "hello"}])
    # Random weights give no JSON.
    with pytest.raises(chat.ChatError, match="for none of 2 prompts"):
        UnitExtractor(settings(model=chat_model, max_new_tokens=5, retries=0))(prompts())


def test_a_chat_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(chat.ChatError, match=f"units.model: {tmp_path}"):
        chat.TransformersChat(str(tmp_path), max_new_tokens=5)


def test_a_chat_model_that_lacks_weights_is_refused(chat_model: str, tmp_path: Path) -> None:
    shutil.copytree(chat_model, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(chat.ChatError, match=r"units\.model: .*no weights for model\.norm\.weight$"):
        chat.TransformersChat(str(tmp_path), max_new_tokens=5)


def test_what_was_extracted_once_comes_from_the_cache(serve, tmp_path: Path) -> None:
    address, requests = serve(lambda body, number: (200, completion('[["red cup"], ["Halt"]]')))
    options = {"endpoint": address, "retries": 0, "cache": str(tmp_path / "deep" / "units.sqlite")}
    first = UnitExtractor(settings(**options))(prompts())
    again = UnitExtractor(settings(**options))
    address2, requests2 = serve(lambda body, number: (200, completion('[["Go"]]')))
    again = UnitExtractor(settings(**{**options, "endpoint": address2}))
    second = again(prompts())
    # The usable answer was kept; the one that the rules stood in for is asked for anew.
    assert first[0] == second[0] and second[1].units == ("Go",) and second[1].source == "llm"
    assert len(requests) == 1 and json.loads(requests2[0]["messages"][1]["content"]) == [PROMPTS[1]]


def test_the_cache_tells_extractors_and_requirements_apart(serve, tmp_path: Path) -> None:
    address, requests = serve(lambda body, number: (200, completion('[["dog"]]')))
    prompt, include = "a photo of a red cup and a dog", [{"class": "dog", "count": 1}]
    for task, metadata in (("ocr", {}), ("ocr", {"include": include}), ("geneval", {}), ("ocr", {})):
        UnitExtractor(settings(endpoint=address, task=task, cache=str(tmp_path / "x")))([Prompt(prompt, metadata)])
    assert len(requests) == 3


def test_the_cache_is_opened_where_a_chat_model_is_used_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = str(tmp_path / "file" / "units.sqlite")
    assert UnitExtractor(Units(source="rules", cache=cache))(prompts())[0].units == ("red cup", "table")
    with pytest.raises(CacheError):
        UnitExtractor(settings(cache=cache, endpoint="http://localhost:9"))(prompts())


@pytest.mark.parametrize(
    "answer",
    [
        f"<think>\nTwo prompts: [[]].\n</think>\n\n{GOOD}",
        f"Two prompts, then.</think>{GOOD}",
        f"<Thinking>hm</Thinking> {GOOD}\n",
        f"[THINK]hm[/THINK]{GOOD}",
        f"<seed:think>hm</seed:think>{GOOD}",
    ],
)
def test_what_a_model_thinks_before_its_answer_is_left_out(answer: str) -> None:
    script = Script(answer)
    assert chat.ask(script, PROMPTS, "general", retries=0) == [["red cup", "table"], ["Go", "sign"]]


def test_thoughts_that_do_not_end_are_no_answer() -> None:
    script = Script(f"<think>{GOOD}", f"<think>x</think>{GOOD[:-1]}", GOOD)
    assert chat.ask(script, PROMPTS, "general", retries=2) == [["red cup", "table"], ["Go", "sign"]]
    # What it thought is not told to it again.
    assert script.asked[2][-2]["content"] == GOOD[:-1]


def test_an_answer_in_parts_is_taken_without_its_thoughts(serve) -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": GOOD}]
    reply = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    address, _ = serve(lambda body, number: (200, reply))
    assert [e.source for e in UnitExtractor(settings(endpoint=address, retries=0))(prompts())] == ["llm", "llm"]


def test_an_endpoint_with_another_token_limit_and_temperature_is_obeyed(serve) -> None:
    def reply(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        if "max_tokens" in body:
            return 400, b"'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        if "temperature" in body:
            return 400, b"'temperature' does not support 0 with this model."
        return 200, completion(GOOD)

    address, requests = serve(reply)
    options = {"endpoint": address, "temperature": None, "max_new_tokens": 7}
    assert UnitExtractor(settings(**options))(prompts())[0].source == "llm"
    assert [request.get("max_completion_tokens") for request in requests] == [None, 7]
    UnitExtractor(settings(token_limit="max_completion_tokens", **options))(prompts())
    assert len(requests) == 3
    with pytest.raises(chat.ChatError, match=r"max_completion_tokens"):
        UnitExtractor(settings(token_limit="max_tokens", **options))(prompts())
    with pytest.raises(chat.ChatError, match=r"does not support 0.*units\.temperature=null"):
        UnitExtractor(settings(endpoint=address))(prompts())


def test_a_model_whose_every_answer_was_replaced_ends_the_command(
    serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, _ = serve(lambda body, number: (200, completion("I cannot do that.")))
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    more = ["source=llm", "model=small", f"endpoint={address}", "cache=null", "retries=0"]
    assert main([str(tmp_path / "p.txt"), "--out", str(tmp_path / "out.jsonl"), "--set", *more]) == 2
    assert "units.model: small has given usable units for none of 2 prompts" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_one_usable_answer_keeps_a_run_going(serve) -> None:
    address, _ = serve(lambda body, number: (200, completion(GOOD if number == 1 else "no")))
    extractor = UnitExtractor(settings(endpoint=address, retries=0))
    assert extractor(prompts())[0].source == "llm"
    assert [e.source for e in extractor([Prompt("a cat", {})])] == ["rules for llm"]


def test_prompts_that_come_twice_are_extracted_once(serve) -> None:
    address, requests = serve(lambda body, number: (200, completion(GOOD)))
    one, two = prompts()
    extractions = UnitExtractor(settings(endpoint=address))([one, two, one, two, one])
    assert [e.units[0] for e in extractions] == ["red cup", "Go", "red cup", "Go", "red cup"]
    assert len(json.loads(requests[0]["messages"][1]["content"])) == 2


def test_more_keys_than_a_statement_takes(tmp_path: Path) -> None:
    cache = UnitCache(tmp_path / "units.sqlite")
    cache.put({str(i): ("p", [str(i)]) for i in range(1200)})
    found = cache.get([str(i) for i in range(1300)])
    assert len(found) == 1200 and found["1199"] == ["1199"]


def test_a_file_that_is_no_cache_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but mine")
    with pytest.raises(CacheError, match="notes.txt"):
        UnitCache(path)
    assert path.read_text() == "not a database, but mine"


def test_a_cache_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file"):
        UnitCache(tmp_path / "file" / "units.sqlite")


def test_units_is_short_for_its_source() -> None:
    assert load_config("tiny", ["units=rules"]).units.source == "rules"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("units=guess", "units.source"),
        ("units.source=llm", "units.model"),
        ("units.model=small", "units.model"),
        ("units.endpoint=http://localhost", "units.endpoint"),
        ("units.task=poetry", "units.task"),
        ("units.retries=-1", "units.retries"),
        ("units.colour=red", "units.colour"),
        ("units=[rules]", "units"),
    ],
)
def test_bad_settings_are_named(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_config("tiny", [override])


def test_star_units_writes_units_that_a_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "prompts.txt", tmp_path / "units.jsonl"
    source.write_text("\n".join(["a red circle", "", 'a green square that says "Go"']) + "\n", encoding="utf-8")
    arguments = [str(source), "--out", str(out), "--pipeline", str(TINY_PIPELINE), "--set", "cache=null"]
    assert main([*arguments, "--max-sequence-length", "16"]) == 0
    printed = capsys.readouterr().out
    assert "red circle" in printed and "found in the token sequence: 3 of 3 (100.00%)" in printed
    read = read_prompts(str(out), "prompts.source")
    assert [(p.text, p.units) for p in read] == [
        ("a red circle", ("red circle",)),
        ('a green square that says "Go"', ("Go", "green square")),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "nowhere.txt"),
        (["{prompts}", "--set", "source=llm"], "units.model"),
        (["{prompts}", "--set", "colour=red"], "colour"),
        (["{prompts}", "--pipeline", "{folder}"], "--pipeline"),
        (["{prompts}", "--out", "{folder}/no/such/folder/out.jsonl"], "no/such/folder"),
        (["{prompts}", "--out", "{folder}/units.txt"], "--out: expected a name that ends in .jsonl"),
        (["{prompts}", "--out", "{folder}/units.tsv"], "--out: expected a name that ends in .jsonl"),
        (["{folder}/./own.jsonl", "--out", "{folder}/own.jsonl"], "--out: expected another file than the prompts"),
    ],
)
def test_star_units_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "own.jsonl").write_text('{"prompt": "a red circle"}\n')
    filled = [part.format(prompts=tmp_path / "prompts.txt", folder=tmp_path) for part in arguments]
    assert main([*filled, *([] if "--set" in filled else ["--set", "cache=null"])]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "own.jsonl").read_text() == '{"prompt": "a red circle"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\xff\xfe\x00", "UTF-8"),
        ("p.txt", b"\n \n", "no prompts"),
        ("p.tsv", b"Text\tCategory\na cat\tAnimals\n", "line 1: .*column 'Prompt'"),
        ("p.tsv", b"\nText\n\na cat\n", "line 2: .*column 'Prompt'"),
        ("p.tsv", b"\n\nCategory\tPrompt\n\nFood\ta cake\nAnimals\n", "line 6: .*2 columns"),
        ("p.tsv", b"Category\tPrompt\n", "no prompts"),
        ("p.tsv", b"Category\tPrompt\nAnimals\n", "line 2.*2 columns"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2"),
        ("p.jsonl", b"{oops\n", "line 1.*JSON"),
        ("p.jsonl", b'{"prompt": "a", "units": "a"}\n', "units"),
        ("p.jsonl", b"[" * 100_000, "line 1"),
    ],
)
def test_a_bad_file_of_prompts_names_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"prompts.source: .*{message}"):
        read_prompts(str(tmp_path / name), "prompts.source")


def test_files_of_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_bytes(b"\xef\xbb\xbfPrompt\tCategory\r\na \xc3\xa9clair\tFood\r\na cat\tAnimals\r\n")
    assert [(p.text, p.metadata["category"]) for p in read_prompts(str(path), "x")] == [
        ("a éclair", "Food"),
        ("a cat", "Animals"),
    ]


def test_cells_that_a_spreadsheet_quotes_are_read_as_they_were(tmp_path: Path) -> None:
    rows = ['a shop sign that says "OPEN LATE"', "a red circle\nand a cross", "a\tcat", '"', "a dog"]
    path = tmp_path / "p.TSV"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerows([["Kind", "Prompt"], *(["x", row] for row in rows)])
    assert [p.text for p in read_prompts(str(path), "x")] == rows
    # A mark that quotes no whole cell stays, and takes nothing behind it in.
    path.write_text('Prompt\tKind\n"Go" says a sign\tx\n"Hello\tx\na 12"\tx\n \n"a\nb"\tx\n"a ""c"""\n')
    expected = ['"Go" says a sign', '"Hello', 'a 12"', "a\nb", 'a "c"']
    assert [p.text for p in read_prompts(str(path), "x")] == expected
    path.write_text('Kind\tPrompt\nx\t"a\nb"\nx\n')
    with pytest.raises(ConfigError, match="line 4: expected at least 2"):
        read_prompts(str(path), "x")


NULLS = {"include": None, "exclude": None, "units": None, "tag": None}
BENCH = {"class": "bench", "count": 1, "color": None, "position": float("nan")}


@pytest.mark.parametrize(
    ("metadata", "units", "usable"),
    [
        ({"include": [BENCH], "exclude": None}, ["bench"], True),
        ({"include": [BENCH, {"class": "cat", "count": 1, "position": ["left of", 0]}]}, ["bench", "cat"], True),
        (NULLS, ["red bench"], False),
        ({"include": float("nan")}, ["red bench"], False),
        ({"include": json.dumps([BENCH])}, ["red bench"], False),
        ({"include": True}, ["red bench"], False),
        ({"include": [None]}, ["red bench"], False),
        ({"include": [{"class": 3, "count": 1}]}, ["red bench"], False),
        ({"include": [{**BENCH, "count": None}]}, ["bench"], False),
        ({"include": [{**BENCH, "color": 3}]}, ["bench"], False),
        ({"include": [{**BENCH, "position": "left"}]}, ["bench"], False),
        ({"include": [BENCH], "exclude": "cat"}, ["bench"], False),
    ],
)
def test_nulls_and_foreign_types_beside_a_prompt_are_absent_or_refused(
    metadata: dict[str, Any], units: list[str], usable: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"prompt": "a red bench", **metadata}) + "\n")
    assert main([str(path), "--out", str(out)]) == 0
    (prompt,) = read_prompts(str(out), "x")
    assert list(prompt.units) == [unit for unit in units if unit in prompt.text]
    reason = unsuitable("geneval_graded", prompt)
    assert (reason is None) == usable
    if usable:
        seen = [DetectedObject("bench", 0.9, None, (0.0, 0.0, 9.0, 9.0))]
        assert judge(seen, prompt.metadata).graded == 1.0 / (1 if len(metadata["include"]) == 1 else 3)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was to be made")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_small_pipeline_is_known_by_name(
    tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n")
    assert main([str(tmp_path / "p.txt"), "--pipeline", "tiny", "--set", "cache=null"]) == 0
    assert "found in the token sequence: 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["{}/nowhere", "./nowhere", "../nowhere/pipeline", "~/no/such/pipeline", "a/b/c"])
def test_a_folder_that_is_not_there_is_asked_of_no_hub(
    folder: str, tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n")
    named = folder.format(tmp_path)
    assert main([str(tmp_path / "p.txt"), "--pipeline", named, "--set", "cache=null"]) == 2
    assert capsys.readouterr().err == f"star-units: --pipeline: no such folder: {named}\n"


def test_what_is_cut_off_is_told_from_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filler = " ".join(["and a cat"] * 60)
    entries = [
        {"prompt": f"a red circle {filler} and a blue square", "units": ["red circle", "blue square"]},
        {"prompt": "a green cross", "units": ["green cross", "yellow triangle"]},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    arguments = [str(path), "--pipeline", "tiny", "--max-sequence-length", "20", "--set", "source=file"]
    assert main(arguments) == 0
    summary, cut, foreign = capsys.readouterr().out.splitlines()[-3:]
    assert summary.startswith("found in the token sequence: 2 of 4")
    assert cut.startswith("    cut off after 16 tokens of CLIP and 20 of T5: blue square in 'a red circle and a cat")
    assert foreign == "    not in the prompt: yellow triangle in 'a green cross'"


@pytest.mark.parametrize("length", ["0", "-3", "many"])
def test_a_length_that_is_none_is_refused(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["p.txt", "--max-sequence-length", length])
    assert "--max-sequence-length" in capsys.readouterr().err


def test_units_of_the_file_are_replaced_and_said_to_be_or_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a red circle", "units": ["red"]}\n{"prompt": "a blue square"}\n')
    assert main([str(path), "--out", str(out), "--set", "cache=null"]) == 0
    assert "1 prompts had units in the file, which are replaced here; --keep keeps them" in capsys.readouterr().out
    assert [p.units for p in read_prompts(str(out), "x")] == [("red circle",), ("blue square",)]
    assert main([str(path), "--out", str(out), "--keep", "--set", "cache=null"]) == 0
    printed = capsys.readouterr().out
    assert "(1 from file, 1 from rules)" in printed and "replaced" not in printed
    assert [p.units for p in read_prompts(str(out), "x")] == [("red",), ("blue square",)]


def test_the_help_says_that_the_rules_are_for_english(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "English alone" in capsys.readouterr().out
    assert "rules (English prompts alone)" in describe_keys()
