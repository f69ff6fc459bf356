"""LangChain's ChatOpenAI, as people call it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import BadRequestError
from pydantic import BaseModel

WORDS = " ".join(f"w{index}" for index in range(16))


class Colour(BaseModel):
    """A colour."""

    name: str
    level: int


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def chat(url: str, model: str, **settings: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_retries=0, **settings)


def test_a_real_model_answers_whole_streamed_and_in_batches(tiny: str) -> None:
    model = chat(tiny, "tiny", temperature=0, seed=1, max_tokens=12)
    whole = model.invoke([SystemMessage("Be brief."), HumanMessage("def add(a, b):")])
    assert isinstance(whole, AIMessage)
    assert whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 12
    pieces = list(model.stream([SystemMessage("Be brief."), HumanMessage("def add(a, b):")], stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert len(pieces) > 4
    assert [piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata] == [12]
    assert [answer.content for answer in model.batch(["one", "two"])] == [
        model.invoke("one").content,
        model.invoke("two").content,
    ]


def test_a_real_model_keeps_to_a_schema(tiny: str) -> None:
    model = chat(tiny, "tiny", max_tokens=60, temperature=0)
    shape = {
        "title": "shade",
        "type": "object",
        "properties": {"name": {"enum": ["red", "blue"]}},
        "required": ["name"],
    }
    answer = model.with_structured_output(shape, method="json_schema").invoke("a colour")
    assert answer["name"] in ("red", "blue")
    logged = chat(tiny, "tiny", max_tokens=3, logprobs=True, top_logprobs=2).invoke("hello")
    assert len(logged.response_metadata["logprobs"]["content"]) == 3


def test_legacy_completions_of_a_real_model(tiny: str) -> None:
    model = OpenAI(base_url=f"{tiny}/v1", api_key="none", model="tiny", max_tokens=5, temperature=0)
    assert model.invoke("import ")
    assert "".join(model.stream("import ")) == model.invoke("import ")


def test_chains_asynchronously(fake: str) -> None:
    chain = (
        ChatPromptTemplate.from_messages([("human", "tell me of {what}")]) | chat(fake, "assistant") | StrOutputParser()
    )

    async def scenario() -> None:
        assert await chain.ainvoke({"what": "foxes"}) == WORDS
        assert "".join([piece async for piece in chain.astream({"what": "foxes"})]) == WORDS
        assert await chain.abatch([{"what": str(number)} for number in range(20)]) == [WORDS] * 20

    asyncio.run(scenario())


def test_tools_are_called_and_their_results_taken(fake: str) -> None:
    model = chat(fake, "assistant").bind_tools([weather])
    asked = HumanMessage("what is the weather in Rome?")
    answer = model.invoke([asked])
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    assert "city" in call["args"]
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model.invoke([asked, answer, result])
    streamed = None
    for piece in model.stream([asked]):
        streamed = piece if streamed is None else streamed + piece
    assert streamed is not None
    assert [(each["name"], each["args"]) for each in streamed.tool_calls] == [("weather", call["args"])]
    forced = chat(fake, "assistant").bind_tools([weather], tool_choice="weather").invoke([asked])
    assert forced.tool_calls[0]["name"] == "weather"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(fake: str, method: str) -> None:
    answer = chat(fake, "assistant").with_structured_output(Colour, method=method).invoke("a colour")
    assert isinstance(answer, Colour)


def test_tiers_and_errors(fake: str) -> None:
    asked = chat(fake, "assistant", extra_body={"lowbit": {"tier": "int4"}}, include_response_headers=True)
    assert asked.invoke("x").response_metadata["headers"]["x-lowbit-tier"] == "int4"
    with pytest.raises(BadRequestError, match=r"lowbit\.teir"):
        chat(fake, "assistant", extra_body={"lowbit": {"teir": "int4"}}).invoke("x")


def test_embeddings(fake: str) -> None:
    model = OpenAIEmbeddings(
        base_url=f"{fake}/v1", api_key="none", model="embedder", check_embedding_ctx_length=False, max_retries=0
    )
    assert model.embed_documents(["a", "abc"]) == [[1.0, 1.0, 0.5], [3.0, 1.0, 0.5]]
    assert model.embed_query("ab") == [2.0, 1.0, 0.5]
