"""An exception is one event in Sentry, whoever else is told of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, logging, sentry_sdk
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sentry_sdk.integrations.fastapi import FastApiIntegration
from sentry_sdk.integrations.starlette import StarletteIntegration
from overdrive import LogHandler, Overdrive, log_directly

log_directly()
told = []
sentry_sdk.init(
    dsn="http://key@127.0.0.1:1/1",
    transport=told.append,
    auto_session_tracking=False,
    # The others take seconds to look for what they are about.
    auto_enabling_integrations=False,
    integrations=[StarletteIntegration(), FastApiIntegration()],
)
logging.basicConfig(handlers=[LogHandler("log")], level="INFO")
app = FastAPI()
Overdrive(app)
logger = logging.getLogger("shop")


@app.get("/broken")
async def broken():
    logger.info("a crumb")
    raise ValueError("broken")


@app.get("/logged")
async def logged():
    try:
        raise KeyError("logged")
    except KeyError:
        logger.exception("it failed")
        raise


@app.get("/caught")
async def caught():
    logger.error("an error of its own")


with TestClient(app, raise_server_exceptions=False) as http:
    for path in ("/broken", "/logged", "/caught"):
        http.get(path)
sentry_sdk.flush()
print(json.dumps([
    [
        event["exception"]["values"][-1]["type"] if "exception" in event else event["logentry"]["message"],
        [crumb["message"] for crumb in event["breadcrumbs"]["values"] if crumb["category"] == "shop"],
    ]
    for event in told
]))
"""


def test_an_exception_is_one_event(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = json.loads(done.stdout)
    assert [what for what, _ in told] == ["ValueError", "KeyError", "an error of its own"]
    assert told[0][1] == ["a crumb"]
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["status"] for line in events if line["logger"] == "overdrive.request"] == [500, 500, 200]
