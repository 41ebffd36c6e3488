"""The server: OpenAI's clients get what `jaxmodels sample` gives, mistakes are told, and nobody is lost at the end."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import socket
import threading

import numpy as np
import pytest

from jaxmodels.generate.sample import sample
from jaxmodels.serve.metrics import compilations
from jaxmodels.serve.service import Limits
from tests.serve.serving import live, published


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return published(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def running(directory):
    with live(directory, Limits(body=20_000, queue=6)) as server:
        yield server


def greedy(running, prompt, tokens):
    """What `sample` adds to a text."""
    writer = running.service.served["tiny"].writer
    ids = writer.encode(prompt) if isinstance(prompt, str) else prompt
    ends = writer.tokenizer.special.ends
    row = sample(writer.model, writer.params, [ids], tokens, temperature=0, ends=ends)[0].tolist()
    new = row[len(ids) :]
    return new[: next((i for i, token in enumerate(new) if token in ends), len(new))]


def decoded(running, tokens):
    return running.service.served["tiny"].writer.tokenizer.decode(tokens)


def test_a_completion_is_what_sample_gives(running):
    status, told = running.post("/v1/completions", prompt="Hello", max_tokens=20, temperature=0)
    expected = greedy(running, "Hello", 20)
    choice = told["choices"][0]
    assert status == 200 and told["object"] == "text_completion" and told["model"] == "tiny"
    assert choice["text"] == decoded(running, expected)
    assert choice["finish_reason"] == ("length" if len(expected) == 20 else "stop")
    assert told["usage"]["prompt_tokens"] == 5 and told["usage"]["completion_tokens"] == len(expected)


def test_many_at_once_each_get_their_own(running):
    prompts = [f"{'abc' * (i % 4)}{i}" for i in range(10)]
    before = compilations()
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        ask = lambda p: running.post("/v1/completions", prompt=p, max_tokens=9, temperature=0)  # noqa: E731
        found = list(pool.map(ask, prompts))
    assert compilations() == before, "nothing is compiled once the server is ready"
    for prompt, (status, told) in zip(prompts, found, strict=True):
        assert status == 200 and told["choices"][0]["text"] == decoded(running, greedy(running, prompt, 9))


def events(running, path, **body):
    """The events of a stream."""
    status, text, headers = running.ask("POST", path, {"model": "tiny", "stream": True, **body})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_adds_up_to_the_whole(running):
    asked = {"prompt": "Größe", "max_tokens": 24, "temperature": 1.0, "seed": 3}
    whole = running.post("/v1/completions", **asked)[1]
    found = events(running, "/v1/completions", **asked, stream_options={"include_usage": True})
    assert "".join(each["choices"][0]["text"] for each in found[:-1]) == whole["choices"][0]["text"]
    assert [each["choices"][0]["finish_reason"] for each in found[:-1]][-1] == whole["choices"][0]["finish_reason"]
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(each["usage"] is None for each in found[:-1])


def test_a_chat_goes_through_the_template(running):
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    asked = {"messages": messages, "max_tokens": 8, "temperature": 0}
    status, told = running.post("/v1/chat/completions", **asked)
    assert status == 200 and told["object"] == "chat.completion"
    message = told["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == decoded(running, greedy(running, "<system>short<user>hi<assistant>", 8))
    found = events(running, "/v1/chat/completions", **asked)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(each["choices"][0]["delta"]["content"] for each in found) == message["content"]
    status, told = running.post("/v1/chat/completions", messages=[{"role": "judge", "content": "hi"}])
    assert status == 400 and "no role judge" in told["error"]["message"]


def test_a_stop_string_ends_the_text_before_itself(running):
    whole = running.post("/v1/completions", prompt="Hello", max_tokens=30, temperature=1, seed=1)[1]["choices"][0]
    stop = whole["text"][7:10]
    at = whole["text"].index(stop)
    asked = {"prompt": "Hello", "max_tokens": 30, "temperature": 1, "seed": 1, "stop": ["never there", stop]}
    cut = running.post("/v1/completions", **asked)[1]["choices"][0]
    assert cut["text"] == whole["text"][:at] and cut["finish_reason"] == "stop"
    streamed = events(running, "/v1/completions", **asked)
    assert "".join(each["choices"][0]["text"] for each in streamed) == cut["text"]
    running.until(lambda: not running.engine.running)


def test_several_answers_differ_and_the_first_has_the_seed(running):
    asked = {"prompt": "Hello", "max_tokens": 12, "temperature": 1.0, "seed": 9}
    one = running.post("/v1/completions", **asked)[1]["choices"][0]["text"]
    told = running.post("/v1/completions", **asked, n=3)[1]
    texts = [choice["text"] for choice in told["choices"]]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert texts[0] == one and len(set(texts)) == 3 and told["usage"]["prompt_tokens"] == 5
    two = running.post("/v1/completions", prompt=["ab", [1, 2, 3]], max_tokens=5, temperature=0)[1]
    assert [c["text"] for c in two["choices"]] == [decoded(running, greedy(running, p, 5)) for p in ("ab", [1, 2, 3])]
    assert two["usage"]["prompt_tokens"] == 5


def test_log_probabilities_are_told(running):
    asked = {"max_tokens": 4, "temperature": 0}
    told = running.post("/v1/completions", prompt="Hello", logprobs=2, **asked)[1]["choices"][0]["logprobs"]
    assert len(told["tokens"]) == 4 == len(told["text_offset"])
    for logprob, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert logprob <= 0 and len(top) <= 2 and max(top.values()) == pytest.approx(logprob)
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3, **asked}
    told = running.post("/v1/chat/completions", **chat)[1]["choices"][0]["logprobs"]["content"]
    assert len(told) == 4 and all(len(each["top_logprobs"]) == 3 for each in told)
    for each in told:
        assert each["bytes"] == (None if "\ufffd" in each["token"] else list(each["token"].encode()))


WRONG = [
    (b"{", 400, "no JSON"),
    (b"[1]", 400, "expected a JSON object"),
    (b"[" * 100_000, 413, "more than 20,000 bytes"),
    (b"[" * 19_000, 400, "no JSON"),
    (b'{"model": "tiny", "temperature": NaN}', 400, "NaN is no number"),
    ({"prompt": "a"}, 400, "got no model"),
    ({"model": "other", "prompt": "a"}, 404, "got model 'other', expected one of tiny"),
    ({"model": ["tiny"], "prompt": "a"}, 400, "got model ['tiny'], expected text"),
    ({"model": "tiny", "prompt": "a", "temprature": 1}, 400, "did you mean 'temperature'?"),
    ({"model": "tiny", "prompt": "a", "temperature": "hot"}, 400, "got temperature 'hot', expected a number"),
    ({"model": "tiny", "prompt": "a", "temperature": -1}, 400, "expected at least 0"),
    ({"model": "tiny", "prompt": "a", "temperature": True}, 400, "got temperature True"),
    ({"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "got max_tokens 0, expected at least 1"),
    ({"model": "tiny", "prompt": "a", "max_tokens": 2.5}, 400, "expected a whole number"),
    ({"model": "tiny", "prompt": "a", "n": 1000}, 400, "expected at most 16"),
    ({"model": "tiny", "prompt": "a", "top_k": 2**31}, 400, "got top_k 2147483648"),
    ({"model": "tiny", "prompt": "a", "stop": [""]}, 400, "got stop"),
    ({"model": "tiny", "prompt": {"text": "a"}}, 400, "got prompt"),
    ({"model": "tiny", "prompt": []}, 400, "got prompt []"),
    ({"model": "tiny", "prompt": [999]}, 400, "got a prompt with token 999"),
    ({"model": "tiny", "prompt": ""}, 400, "got an empty prompt"),
    ({"model": "tiny", "prompt": "a" * 90, "max_tokens": 20}, 400, "90 tokens and 20 to add"),
    ({"model": "tiny", "prompt": "\ud800"}, 400, "surrogate"),
    ({"model": "tiny", "prompt": "a", "logit_bias": {"1": 5}}, 400, "got logit_bias, which is not computed here"),
    ({"model": "tiny", "prompt": "a", "stream_options": {"include_usage": True}}, 400, "with stream true alone"),
]


@pytest.mark.parametrize(("body", "status", "message"), WRONG, ids=lambda value: repr(value)[:40])
def test_a_mistake_is_one_clear_line(running, body, status, message):
    found, told, _ = running.ask("POST", "/v1/completions", body)
    assert found == status and message in told["error"]["message"] and "\n" not in told["error"]["message"]
    assert "--" not in told["error"]["message"] and set(told["error"]) == {"message", "type", "param", "code"}


def test_other_paths_and_methods_are_refused(running):
    assert running.ask("GET", "/v1/nothing")[0] == 404
    assert running.ask("GET", "/v1/completions")[0] == 405
    assert running.ask("GET", "/v1/models/other")[0] == 404
    status, told, _ = running.ask("GET", "/v1/models")
    assert status == 200 and told["data"][0]["id"] == "tiny" and told["data"][0]["max_model_len"] == 96
    assert running.ask("GET", "/health")[:2] == (200, {"status": "ready"})
    chat = {"model": "tiny", "messages": [{"role": "user"}]}
    assert running.ask("POST", "/v1/chat/completions", chat)[0] == 400


def test_the_official_client_speaks_to_it(running):
    openai = pytest.importorskip("openai", reason="needs the package openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    done = client.completions.create(model="tiny", prompt="Hello", max_tokens=6, temperature=0)
    assert done.choices[0].text == decoded(running, greedy(running, "Hello", 6))
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = client.chat.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
    # an answer goes back as it came, with all fields that the client knows
    message = client.chat.completions.create(**asked).choices[0].message
    asked["messages"] += [message, {**message.model_dump(), "role": "user"}]
    again = client.chat.completions.create(**asked).choices[0].message.content
    assert again == decoded(running, greedy(running, f"<user>hi<assistant>{whole}<user>{whole}<assistant>", 6))
    with pytest.raises(openai.BadRequestError, match="expected at most 2"):
        client.completions.create(model="tiny", prompt="Hello", temperature=3)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="Hello")


def hang(running, **body):
    """Open a stream, and return its connection after the first event."""
    sent = json.dumps({"model": "tiny", "stream": True, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
    connection = socket.create_connection(("127.0.0.1", running.port))
    connection.sendall(head + sent)
    got = b""
    while b"data: " not in got:
        part = connection.recv(4096)
        assert part, got
        got += part
    return connection


def hold(running):
    """Keep the engine from doing a turn, until the returned event is set."""
    go, held = threading.Event(), threading.Event()
    running.service.served["tiny"].worker._orders.put(lambda: (held.set(), go.wait(120)))
    assert held.wait(120)
    return go


def test_a_client_that_hangs_up_frees_its_pages(running):
    connection = hang(running, prompt="a", max_tokens=90)
    go = hold(running)  # so that the text cannot end by itself
    connection.close()
    running.until(lambda: running.service.inside == 0)
    turns = running.engine.totals.steps
    go.set()
    running.until(lambda: running.engine.pages.free == running.engine.pages.count)
    assert running.engine.totals.steps <= turns + 1 and running.service.answers == 0


def test_too_many_are_told_to_come_again(running):
    go = hold(running)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        full = pool.submit(running.post, "/v1/completions", prompt=["a"] * 10, max_tokens=2)
        running.until(lambda: running.service.answers == 10)
        status, told, headers = running.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "a"})
        go.set()
        assert full.result()[0] == 200
    assert status == 429 and int(headers["retry-after"]) >= 1 and told["error"]["code"] == "overloaded"
    assert running.service.answers == 0


def test_metrics_have_the_names_that_dashboards_know(running):
    from prometheus_client.parser import text_string_to_metric_families

    running.post("/v1/completions", prompt="count me", max_tokens=3, temperature=0)
    status, text, _ = running.ask("GET", "/metrics")
    found = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    assert status == 200 and found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert 0 <= found["vllm:kv_cache_usage_perc"] <= 1
    assert found["vllm:generation_tokens_total"] >= 3 and found["vllm:prefix_cache_queries_total"] >= 8
    assert found["vllm:time_to_first_token_seconds_count"] >= 1 and "vllm:prefix_cache_hits_total" in found
    assert {"vllm:request_success_total", "jaxmodels:http_requests_total", "jaxmodels:compilations_total"} <= set(found)


def test_a_log_has_no_prompts(running, capfd):
    running.post("/v1/completions", prompt="a secret", max_tokens=3)
    running.until(lambda: running.service.inside == 0)  # the line is written behind the answer
    said = capfd.readouterr().err
    line = json.loads(said.strip().splitlines()[-1])
    assert line["path"] == "/v1/completions" and line["status"] == 200 and line["completion_tokens"] <= 3
    assert "secret" not in said


def test_keys_readiness_and_the_end(directory):
    """Without a key there is nothing; before all is compiled, and after SIGTERM, 503; what was taken is answered."""
    from jaxmodels.serve.server import prepare

    with live(directory, Limits(keys=("open sesame",)), ready=False, rows=1, chunks=(16,)) as server:
        key = {"Authorization": "Bearer open sesame"}
        body = {"model": "tiny", "prompt": "a", "max_tokens": 80, "temperature": 0}
        assert server.ask("GET", "/health")[0] == server.ask("GET", "/v2/health/ready")[0] == 503
        assert server.ask("GET", "/v2/health/live")[0] == 200
        assert server.ask("POST", "/v1/completions", body, **key)[0] == 503
        prepare(server.service, lambda _: None)
        assert server.ask("GET", "/health")[0] == 200
        (served,) = server.service.served.values()
        served.worker.error = RuntimeError("the device is gone")
        for path in ("/health", "/v2/health/ready", "/v2/health/live"):
            assert server.ask("GET", path)[:2] == (503, {"status": "failed: tiny"})
        served.worker.error = None
        assert server.ask("GET", "/v1/models")[0] == server.ask("GET", "/v1/models", Authorization="Bearer x")[0] == 401
        go = hold(server)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            taken = [pool.submit(server.ask, "POST", "/v1/completions", body, **key) for _ in range(2)]
            server.until(lambda: server.service.answers == 2)
            server.server.handle_exit(signal.SIGTERM, None)
            assert server.ask("POST", "/v1/completions", body, **key)[0] == server.ask("GET", "/health")[0] == 503
            go.set()
            answers = [each.result() for each in taken]
        assert [status for status, _, _ in answers] == [200, 200]
        assert len({told["choices"][0]["text"] for _, told, _ in answers}) == 1
        server.until(lambda: server.server.should_exit)
    assert np.isfinite(server.engine.totals.new_tokens)


def test_a_server_that_cannot_be_is_refused_before_it_listens(directory, tmp_path, capsys):
    from jaxmodels.cli import main
    from jaxmodels.serve.server import bound

    (tmp_path / "empty").write_text("\n")
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        cases = [
            ([tmp_path], "expected a run directory or one with config.json"),
            ([directory, "--keys", tmp_path / "empty"], "which is empty, expected a key a line"),
            ([directory, "--keys", tmp_path / "none"], "which cannot be read"),
            ([directory, "--port", taken.getsockname()[1]], "which cannot be listened at"),
            ([directory, "--cache-gib", "1e-6", "--port", "0"], "expected at least that of one text"),
        ]
        for argv, message in cases:
            assert main(["serve", *map(str, argv)]) == 2
            said = capsys.readouterr().err
            assert message in said and said.count("\n") == 1, said
