"""Distillation: a small server on this machine as the teacher, and a model; what is kept, asked again, resumed."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
from tiny import exit_code, read_rows, run_eval

from tooln1.data import read_examples, write_examples
from tooln1.prepare import distill
from tooln1.prompt import build_messages, format_reply, without_stop_token
from tooln1.rewards import REWARDS

DEMO = tiny.ROOT / "assets" / "demo"
KEY = "sk-secret/7"
EXAMPLES = [replace(example, source=f"s{i % 2}") for i, example in enumerate(tiny.examples(8))]


class Teacher(BaseHTTPRequestHandler):
    """Answers a request for an example with its next answer, (status, headers, message or text); the last one stays."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        name = next(e.id for e in EXAMPLES if build_messages(e) == body["messages"])
        answers = self.server.script[name]
        status, headers, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == 0:
            return  # the connection is closed without an answer
        if isinstance(answer, dict):
            answer = json.dumps({"choices": [{"message": answer}]})
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def teacher(monkeypatch):
    """The server; `script` is the answers by example, `pauses` what the client has waited."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Teacher) as server:
        server.requests, server.pauses = [], []
        server.script = {example.id: [right(example)] for example in EXAMPLES}
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(distill.time, "sleep", server.pauses.append)
        monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
        yield server
        server.shutdown()


@pytest.fixture
def data(tmp_path):
    write_examples(EXAMPLES, tmp_path / "data.jsonl")
    return tmp_path / "data.jsonl"


def right(example, thought="It adds."):
    return 200, {}, {"content": format_reply(example.answer, thought)}


def cut_off(example):
    message = {"content": format_reply(example.answer, "It adds.")}
    return json.dumps({"choices": [{"message": message, "finish_reason": "length"}]})


def run(*arguments):
    return exit_code(lambda: distill.main([*map(str, arguments)]))


def asked(server, data, *arguments):
    """Arguments that ask the server."""
    where = ["--endpoint", f"http://127.0.0.1:{server.server_port}/v1/", "--teacher-model", "r1"]
    return ["--examples", data, "--out", data.parent / "out", *where, *arguments]


def test_right_replies_are_kept_and_the_others_counted(teacher, data, capsys):
    e, wrong = EXAMPLES, format_reply([{"name": "add", "arguments": {"a": 0}}], "t")
    calls = [format_reply(example.answer) for example in e]
    apart = {"content": calls[1], "reasoning_content": "It adds."}  # DeepSeek's API
    teacher.script |= {
        "tiny-0": [(200, {}, {"content": wrong}), right(e[0])],
        "tiny-1": [(200, {}, apart)],
        "tiny-2": [(200, {}, {"content": f"It adds.</think> {calls[2]}"})],  # <think> is in the template
        "tiny-3": [(200, {}, "no JSON"), (200, {}, '{"choices": []}')],
        "tiny-4": [(200, {}, {"content": None, "reasoning_content": "It"}), (200, {}, "[1]")],
        "tiny-5": [(200, {}, {"content": calls[5]}), (200, {}, cut_off(e[5]))],
        "tiny-6": [(200, {}, {"content": f"<think>\\ud83d</think>{calls[6]}".encode().decode("unicode_escape")})] * 2,
        "tiny-7": [(200, {}, {"content": calls[7], "reasoning": "It adds."})],  # vLLM
    }
    assert run(*asked(teacher, data, "--samples", 2, "--temperature", 0.5, "--max-reply-tokens", 77)) == 0
    assert len(teacher.requests) == 2 + 1 + 1 + 2 + 2 + 2 + 2 + 1
    path, key, body = teacher.requests[0]
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body | {"messages": 0} == {"model": "r1", "messages": 0, "temperature": 0.5, "max_tokens": 77}
    names = ("traces", "calls", "first_half", "second_half")
    kept, calls, *halves = (read_examples(data.parent / "out" / f"{name}.jsonl") for name in names)
    assert kept == [replace(e[i], reply=format_reply(e[i].answer, "It adds.")) for i in (0, 1, 2, 7)]
    assert calls == [e[i] for i in (0, 1, 2, 7)] and halves == [kept[:2], kept[2:]]
    assert all(REWARDS["binary"](example.reply, example.answer) == 1 for example in kept)
    report = json.loads((data.parent / "out" / "report.json").read_text())
    assert (report["asked"], report["kept"], report["share_kept"]) == (8, 4, 0.5)
    assert report["rejected"] == {"no_call_block": 4}
    assert capsys.readouterr().out == "kept 4 of 8 examples (50.0%)\n"


def test_a_busy_endpoint_is_asked_again(teacher, data):
    teacher.script["tiny-0"] = [(429, {"Retry-After": "7"}, "wait"), right(EXAMPLES[0])]
    teacher.script["tiny-4"] = [(422, {}, "too long"), right(EXAMPLES[4])]  # of this prompt alone
    teacher.script["tiny-2"] = [(500, {}, ""), (503, {"Retry-After": "soon"}, ""), (0, {}, ""), right(EXAMPLES[2])]
    assert run(*asked(teacher, data, "--source", "s0")) == 0
    kept = read_examples(data.parent / "out" / "traces.jsonl")
    assert [example.id for example in kept] == ["tiny-0", "tiny-2", "tiny-6"]
    assert sorted(filter(None, teacher.pauses)) == [1, 2, 4, 7] and len(teacher.requests) == 2 + 4 + 1 + 1


@pytest.mark.parametrize(("answer", "requests"), [((401, {}, f"the key {KEY} is\nunknown"), 1), ((502, {}, KEY), 8)])
def test_an_endpoint_that_refuses_ends_in_a_sentence_without_the_key(teacher, data, capsys, answer, requests):
    teacher.script["tiny-0"] = [answer] * 8
    assert run(*asked(teacher, data, "--concurrency", 1)) == 2
    printed = "".join(capsys.readouterr())
    first = [body for *_, body in teacher.requests if body["messages"] == build_messages(EXAMPLES[0])]
    assert [pause for pause in teacher.pauses if pause] == [1, 2, 4, 8, 16, 32, 64][: requests - 1]
    assert len(first) == requests and f"/v1/chat/completions gives no reply: {answer[0]}" in printed
    assert printed.count("error: ") == 1 and "Traceback" not in printed and ("is unknown" in printed) == (requests == 1)
    teacher.script = {example.id: [right(example)] for example in EXAMPLES}
    assert run(*asked(teacher, data)) == 0
    files = [path.read_text() for path in (data.parent / "out").iterdir()]
    assert len(files) == 6 and not any("secret" in text for text in [printed, *capsys.readouterr(), *files])


def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(teacher, data, tmp_path):
    wrong, out, files = (200, {}, {"content": "no"}), tmp_path / "out", ("traces.jsonl", "report.json")
    arguments = asked(teacher, data, "--samples", 2, "--concurrency", 2)
    whole = {example.id: [wrong, wrong if i == 5 else right(example, "ü")] for i, example in enumerate(EXAMPLES)}
    teacher.script = {name: [*answers] for name, answers in whole.items()}
    assert run(*arguments) == 0
    undisturbed = [(out / name).read_bytes() for name in files]
    lines = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    torn = next(i for i in range(2, 16) if rows[i]["sample"] == 1)  # the second reply of an example
    known = {row["id"] for row in rows[: torn - 1]}
    for name in files:
        (out / name).unlink()
    (out / "predictions.jsonl").write_text("".join(lines[:torn]) + lines[torn][:-20])
    teacher.script, teacher.requests = {name: [*answers] for name, answers in whole.items()}, []
    assert run(*arguments) == 0
    assert [(out / name).read_bytes() for name in files] == undisturbed and len(teacher.requests) == 2 * (
        8 - len(known)
    )
    assert run(*arguments) == 0 and len(teacher.requests) == 2 * (8 - len(known))  # nothing is left to ask


def test_replies_of_another_teacher_are_refused(teacher, data, capsys):
    assert run(*asked(teacher, data)) == 0
    before = {path: path.read_bytes() for path in (data.parent / "out").iterdir()}
    assert run(*asked(teacher, data, "--teacher-model", "other")) == 2
    assert "holds replies of r1 at temperature 0.6; choose another --out for other" in capsys.readouterr().err
    assert len(teacher.requests) == 8
    assert {path: path.read_bytes() for path in (data.parent / "out").iterdir()} == before


@pytest.mark.slow
def test_the_right_replies_of_an_evaluation_are_kept_and_imitated(tmp_path, capsys):
    """The demo model is its own teacher: eval.py samples, the first right reply to each example is kept."""
    examples, data, out = read_examples(DEMO / "heldout.jsonl")[:8], tmp_path / "data.jsonl", tmp_path / "out"
    write_examples(examples, data)
    sampling = ["--max-reply-tokens", 96, "--temperature", 1.5, "--samples", 3, "--seed", 4, "--model", DEMO / "model"]
    run_eval("--bench", f"examples={data}", "--out", tmp_path / "eval", "--device", "cpu", *sampling)
    predictions = tmp_path / "eval" / "predictions.jsonl"
    expected: dict[str, str] = {}
    for row, example in ((row, e) for row in read_rows(predictions) for e in examples if e.id == row["id"]):
        if row["finished"] and REWARDS["binary"](row["completion"], example.answer) == 1:
            expected.setdefault(example.id, without_stop_token(row["completion"]))
    assert 2 <= len(expected) < 8
    assert run("--examples", data, "--predictions", predictions, "--out", out) == 0
    assert f"kept {len(expected)} of 8 examples" in capsys.readouterr().out
    assert {example.id: example.reply for example in read_examples(out / "traces.jsonl")} == expected

    file, size = str(out / "traces.jsonl"), {"prompts_per_step": 2, "prompts_per_minibatch": 2, "steps": 1}
    imitated = tiny.run(tmp_path, "sft", mode="sft", model=str(DEMO / "model"), train_data=file, eval_data="", **size)
    assert "loss" in tiny.measured(imitated)[0] and (imitated / "hf" / "model.safetensors").exists()
