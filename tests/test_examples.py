"""The examples do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from overdrive.testing import caching as cached


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_caching() -> None:
    from examples import caching

    with cached(caching.overdrive), TestClient(caching.app) as http:

        def marks() -> list[str]:
            answers = [http.get("/products", headers={"x-shop": shop}) for shop in ("north", "south")]
            return [answer.headers["x-cache"] for answer in answers]

        assert [marks(), marks()] == [["miss", "miss"], ["hit", "hit"]]
        assert http.post("/products?name=Chair", headers={"x-shop": "north"}).status_code == 201
        assert http.get("/products", headers={"x-shop": "north"}).json() == ["Table", "Chair"]
        assert [marks(), marks()] == [["hit", "miss"], ["hit", "hit"]]
        assert http.post("/imported").status_code == 204
        assert [marks(), marks()] == [["miss", "miss"], ["hit", "hit"]]
        assert http.delete("/shops/north").status_code == 204
        assert marks() == ["miss", "hit"]


def test_values() -> None:
    from examples import values

    with cached(values.overdrive), TestClient(values.app) as http:
        for rate in (0.5, 2.0):
            assert http.put(f"/rates/EUR?rate={rate}").status_code == 204
            for _ in range(2):
                assert http.get("/prices/100?currency=EUR").json() == 100 * rate
                assert http.get("/summary").json() == {"count": 2, "highest": max(rate, 1)}
        assert http.get("/prices/100?currency=XXX").json() is None
        assert http.put("/rates/EUR?rate=nan").status_code == 422


def test_operations() -> None:
    from examples import operations

    with cached(operations.overdrive), TestClient(operations.app) as http:
        assert [http.get(path).status_code for path in ("/live", "/ready")] == [200, 200]
        assert [http.post("/orders").json() for _ in range(2)] == [1, 2]
        assert [http.get("/orders/count").json() for _ in range(2)] == [2, 2]
        late = http.get("/slow", headers={"x-timeout-ms": "200"})
        assert (late.status_code, late.json()["code"]) == (503, "deadline_exceeded")
        metrics = http.get("/metrics").text
        assert "db_client_connection_count{" in metrics
        assert "overdrive_cache" in metrics
