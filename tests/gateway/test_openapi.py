"""The description of the API: complete, and as good as its word."""

from __future__ import annotations

import json
import random
from typing import Any

from fake_engine import Engine
from harness import gateway, run


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in references(item)]
    return [found for item in value for found in references(item)] if isinstance(value, list) else []


def test_it_names_every_route_and_every_reference_leads_somewhere() -> None:
    async def scenario() -> None:
        async with gateway([Engine()]) as bench:
            async with bench.http.get(f"{bench.url}/openapi.json") as response:
                document = await response.json()
            assert document["openapi"].startswith("3.1")
            for route in bench.app.router.routes():
                if route.method != "HEAD" and route.resource is not None:
                    operation = document["paths"][route.resource.canonical][route.method.lower()]
                    assert operation["summary"], route
                    assert ("requestBody" in operation) == (route.method == "POST"), route
            for reference in references(document):
                place = document
                for part in reference.removeprefix("#/").split("/"):
                    place = place[part]
            operations = [each["operationId"] for path in document["paths"].values() for each in path.values()]
            assert len(operations) == len(set(operations))

    run(scenario)


def test_requests_that_break_the_description_are_refused_in_its_words() -> None:
    """A wrong type in each field that the description types: always a 400 in the shape it promises."""

    async def scenario() -> None:
        chance = random.Random(0)
        async with gateway([Engine()]) as bench:
            async with bench.http.get(f"{bench.url}/openapi.json") as response:
                document = await response.json()
            schemas = document["components"]["schemas"]
            for path, operations in document["paths"].items():
                body = operations.get("post", {}).get("requestBody")
                if body is None:
                    continue
                schema = schemas[body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]
                for field in schema["properties"]:
                    wrong = chance.choice([{"a": {"b": [None]}}, [[[{}]]]])
                    status, answer = await bench.post(path, {field: wrong})
                    assert status in (400, 404), (path, field, answer)
                    assert set(answer["error"]) == {"message", "type", "param", "code"}, json.dumps(answer)
            assert bench.engines[0].counts["requests"] == 0

    run(scenario)
