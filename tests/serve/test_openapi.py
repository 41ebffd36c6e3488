"""The server's description of itself: what it does not admit is refused, what it does is read, and answers are of the
forms that it says, whatever is sent; no answer is a failure of the server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmodels.serve import openapi
from jaxmodels.serve.app import ENDPOINTS
from jaxmodels.serve.asked import Body, Chat, Completion, Embed
from jaxmodels.serve.classes import Classes
from jaxmodels.serve.errors import Refused
from jaxmodels.serve.forms import fits
from jaxmodels.serve.inference import FORM
from jaxmodels.serve.opened import Opened, open_model
from jaxmodels.serve.service import Limits
from tests.serve import test_embeddings, test_inference
from tests.serve.serving import live, published

SAME = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
TOGETHER = ("expected it to be n", "with stream true alone", "with logprobs true alone", "number that float32 holds")
"""What a schema does not say: which fields go together, and that numbers are those of float32."""


def values(form: Any) -> st.SearchStrategy[Any]:
    """Values that a schema admits; small ones, and those that a user of the API would send."""
    if "anyOf" in form:
        return st.one_of([values(each) for each in form["anyOf"]])
    if "enum" in form:
        return st.sampled_from(form["enum"])
    match form.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            least = form.get("minimum", 0)
            return st.integers(least, min(form.get("maximum", least + 4), least + 4))
        case "number":
            least, most = form.get("minimum", form.get("exclusiveMinimum")), form.get("maximum")
            bounds = {"exclude_min": "exclusiveMinimum" in form, "width": 32, "allow_subnormal": False}
            return st.floats(float(least), float(most), **bounds)
        case "string":
            words = st.sampled_from(("user", "assistant")) | TEXT
            return words.filter(lambda text: len(text) >= form.get("minLength", 0))
        case "array":
            least = form.get("minItems", 0)
            return st.lists(values(form["items"]), min_size=least, max_size=min(form.get("maxItems", 3), least + 2))
        case "object":
            known, rest = form.get("properties", {}), form.get("additionalProperties")
            needed = {name: values(each) for name, each in known.items() if name in form.get("required", ())}
            others = {name: values(each) for name, each in known.items() if name not in needed}
            found = st.fixed_dictionaries(needed, optional=others)
            return found if not isinstance(rest, dict) else st.builds(
                lambda more, own: {**more, **own}, st.dictionaries(TEXT, values(rest), max_size=1), found
            )  # fmt: skip
    return ANY


@st.composite
def bodies(draw, form):
    """Bodies of a form, and those with something in them that may be of another."""
    body = draw(values(form))
    where, change = body, draw(st.sampled_from(("none", "value", "drop", "add")))
    if isinstance(inner := body.get("inputs"), list) and inner and draw(st.booleans()):
        where = inner[0]
    if change == "add":
        where[draw(TEXT)] = draw(ANY)
    elif change != "none":
        name = draw(st.sampled_from(sorted(where)))
        where |= {name: draw(ANY)}
        if change == "drop":
            del where[name]
    return body


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    more = [open_model(test_embeddings.published(folder / "words"), "words")]
    more.append(Opened("pics", classes=Classes.of_run(test_inference.made(tmp_path_factory.mktemp("run")))))
    with live(published(folder / "tiny"), Limits(body=100_000, queue=20), more=more, rows=2, chunks=(64,)) as server:
        yield server


@pytest.fixture(scope="module")
def document(running):
    return running.ask("GET", "/openapi.json")[1]


def check(document, form, value):
    jsonschema.validate(value, {**form, "components": document["components"]}, jsonschema.Draft202012Validator)


def checked(document, operation, status, told, headers):
    """Hold an answer against the description of its operation."""
    assert status < 500 or status == 503, told
    answer = operation["responses"]["200" if status == 200 else "default"]["content"]
    media = headers["content-type"].partition(";")[0]
    if media == "text/event-stream":
        name = next(
            name for name in ("ChatChunk", "CompletionAnswer") if name in answer[media]["schema"]["description"]
        )
        events = told.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        for event in events[:-2]:
            part = json.loads(event.removeprefix("data: "))
            check(document, {"$ref": f"#/components/schemas/{name}"}, part)
    elif media != "application/octet-stream":
        check(document, answer[media]["schema"], told)


def test_every_path_without_a_body_answers_as_described(document, running):
    """For each name and version that it lists; a path has no operation that another model's kind alone has."""
    for path, operations in document["paths"].items():
        assert set(operations) <= {"get", "post"} and len(operations) == 1
        for operation in operations.values():
            for answer in operation["responses"].values():
                for content in answer["content"].values():
                    jsonschema.Draft202012Validator.check_schema(content["schema"])
        if "get" in operations:
            told = {each["name"]: each["schema"]["enum"] for each in operations["get"].get("parameters", [])}
            for name in told.get("name", [""]):
                asked = path.replace("{name}", name).replace("{version}", "1")
                status, *rest = running.ask("GET", asked)
                assert status == 200, asked
                checked(document, operations["get"], status, *rest)
    infer = document["paths"]["/v2/models/{name}/infer"]["post"]
    assert infer["parameters"][0]["schema"]["enum"] == ["pics"]
    assert document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"][
        "properties"
    ]["model"]["enum"] == ["words"]
    assert "security" not in document and document["paths"]["/health"]["get"]["security"] == []
    locked = dataclasses.replace(running.service, limits=Limits(keys=("sesame",)))
    assert openapi.document(locked, ENDPOINTS)["security"] == [{"key": []}]
    assert set(running.ask("POST", "/v1/models")[2]["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize(
    "path", ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v2/models/{name}/infer")
)
def test_whatever_is_sent_is_answered_as_described(document, running, path):
    operation = document["paths"][path]["post"]
    form = operation["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator.check_schema(form)
    answered = set()

    @settings(max_examples=40, **SAME)
    @given(body=bodies(form))
    def whatever(body):
        status, told, headers = running.ask("POST", path.replace("{name}", "pics"), body)
        checked(document, operation, status, told, headers)
        if not jsonschema.Draft202012Validator(form).is_valid(body):
            assert 400 <= status < 500, body
        answered.add(status)

    whatever()
    # tensors whose shape and values fit are not drawn by chance
    assert {200, 400} <= answered | ({200} if "infer" in path else set())


@pytest.mark.parametrize("kind", (Completion, Chat, Embed))
def test_what_the_description_admits_is_read(kind: type[Body]):
    """Except where fields do not go together."""
    form = kind.schema(["tiny"])

    @settings(max_examples=60, **SAME)
    @given(body=bodies(form))
    def admitted(body):
        valid = jsonschema.Draft202012Validator(form).is_valid(body)
        try:
            kind.read(json.dumps(body).encode())
            known = valid or body["model"] != "tiny"
            assert known, body
        except Refused as refused:
            assert not valid or any(said in refused.message for said in TOGETHER), (refused.message, body)

    admitted()


@settings(max_examples=100, **SAME)
@given(body=bodies(FORM))
def test_a_form_admits_what_its_schema_says(body):
    assert fits(FORM, body) == jsonschema.Draft202012Validator(FORM).is_valid(body)
