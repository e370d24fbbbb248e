"""Settings come from arguments and variables; whatever is wrong is named in one line."""

from __future__ import annotations

import json
import os

import pytest
from pydantic import ValidationError
from pydantic_core import from_json

from overdrive import ConfigurationError, Settings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("OVERDRIVE_")]:
        monkeypatch.delenv(name)


def complaint(**values: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(**values)
    message = str(caught.value)
    assert "\n" not in message
    # pydantic's own error would repeat every value, secrets too.
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def test_defaults() -> None:
    assert Settings.load().model_dump() == {
        "database_url": "sqlite+aiosqlite:///overdrive.sqlite",
        "redis_url": None,
        "pool": {
            "size": 10,
            "max_overflow": 20,
            "timeout": 30,
            "recycle": 1800,
            "max_waiting": None,
            "linger": 10,
            "validate_after": 30,
            "leak_after": None,
            "min_idle": 0,
            "pgbouncer": False,
            "processes": None,
            "strict": False,
            "deadline": None,
            "deadline_header": None,
            "stop_abandoned": False,
        },
        "cache": {
            "enabled": None,
            "ttl": 60,
            "prefix": "overdrive",
            "max_bytes": None,
            "consistency": "bounded",
            "max_body": 1_048_576,
            "gzip": True,
            "hide_status": False,
            "mode": "on",
            "verify": 0,
            "off": (),
            "listen": False,
            "direct_url": None,
        },
        "log": {
            "events": True,
            "request_id_header": "x-request-id",
            "trust_request_id": False,
            "sample": {},
            "repeated_statements": 20,
            "server_timing": False,
        },
        "pagination": {
            "size": 50,
            "max_size": 100,
            "max_offset": 1_000_000,
            "cache_totals": False,
            "link_header": True,
            "secrets": (),
        },
        "admission": {"enabled": True, "max_wait": 0.5, "drain": 0, "away_after": 5},
    }


def test_every_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "DATABASE_URL": "postgresql://host/name",
        "REDIS_URL": "redis://host",
        "POOL__SIZE": 1,
        "POOL__MAX_OVERFLOW": 2,
        "POOL__TIMEOUT": 3.5,
        "POOL__RECYCLE": -1,
        "POOL__MAX_WAITING": 5,
        "POOL__LINGER": 6.5,
        "POOL__VALIDATE_AFTER": 7.5,
        "POOL__LEAK_AFTER": 8.5,
        "POOL__MIN_IDLE": 1,
        "POOL__PGBOUNCER": True,
        "POOL__PROCESSES": 9,
        "POOL__STRICT": True,
        "POOL__DEADLINE": 2.5,
        "POOL__DEADLINE_HEADER": "x-request-timeout-ms",
        "POOL__STOP_ABANDONED": True,
        "CACHE__ENABLED": False,
        "CACHE__TTL": 4.5,
        "CACHE__PREFIX": "shop",
        "CACHE__MAX_BYTES": 5,
        "CACHE__CONSISTENCY": "strict",
        "CACHE__MAX_BODY": 6,
        "CACHE__GZIP": False,
        "CACHE__HIDE_STATUS": True,
        "CACHE__MODE": "shadow",
        "CACHE__VERIFY": 0.5,
        "CACHE__OFF": '["/one", "/two"]',
        "CACHE__LISTEN": True,
        "CACHE__DIRECT_URL": "postgresql://direct/x",
        "LOG__EVENTS": False,
        "LOG__REQUEST_ID_HEADER": "x-id",
        "LOG__TRUST_REQUEST_ID": True,
        "LOG__SAMPLE": {"/health": 0.5},
        "LOG__REPEATED_STATEMENTS": 7,
        "LOG__SERVER_TIMING": True,
        "PAGINATION__SIZE": 7,
        "PAGINATION__MAX_SIZE": 8,
        "PAGINATION__MAX_OFFSET": 9,
        "PAGINATION__CACHE_TOTALS": True,
        "PAGINATION__LINK_HEADER": False,
        "PAGINATION__SECRETS": "hush" * 4,
    }
    for name, value in given.items():
        monkeypatch.setenv(f"OVERDRIVE_{name}", json.dumps(value) if isinstance(value, dict) else str(value))

    read = Settings.load().model_dump()
    (secret,) = read["pagination"].pop("secrets")
    assert secret.get_secret_value() == given.pop("PAGINATION__SECRETS")
    flat = {
        f"{part}__{name}": value
        for part in ("pool", "cache", "log", "pagination")
        for name, value in read[part].items()
    }
    assert list(flat.pop("cache__off")) == from_json(given.pop("CACHE__OFF"))
    flat |= {name: read[name] for name in ("database_url", "redis_url")}
    assert {name.upper(): value for name, value in flat.items()} == given


def test_arguments_win_over_variables_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERDRIVE_REDIS_URL", "redis://variable")
    monkeypatch.setenv("OVERDRIVE_POOL__SIZE", "5")
    monkeypatch.setenv("OVERDRIVE_POOL__TIMEOUT", "6")
    settings = Settings.load(redis_url="redis://argument", pool={"size": 7})
    assert settings.redis_url == "redis://argument"
    assert (settings.pool.size, settings.pool.timeout) == (7, 6)


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("POOL__SIZE", "abc", "valid integer"),
        ("POOL__SIZE", "0", "greater than or equal to 1"),
        ("POOL__MAX_OVERFLOW", "-1", "greater than or equal to 0"),
        ("POOL__TIMEOUT", "0", "greater than 0"),
        ("POOL__TIMEOUT", "soon", "valid number"),
        ("POOL__RECYCLE", "-2", "greater than or equal to -1"),
        ("CACHE__ENABLED", "maybe", "valid boolean"),
        ("CACHE__TTL", "0", "greater than 0"),
        ("CACHE__PREFIX", "", "at least 1 character"),
        ("CACHE__MAX_BYTES", "-1", "greater than or equal to 0"),
        ("CACHE__MAX_BODY", "1.5", "valid integer"),
        ("CACHE__OFF", "[users", 'looks like ["/users", "/orders"]'),
        ("LOG__EVENTS", "", "valid boolean"),
        ("LOG__SAMPLE", "/health=0", 'looks like {"/health": 0}'),
        ("LOG__REQUEST_ID_HEADER", "x request id", "should match pattern"),
        ("LOG__TRUST_REQUEST_ID", "perhaps", "valid boolean"),
        ("PAGINATION__SIZE", "0", "greater than or equal to 1"),
        ("PAGINATION__MAX_SIZE", "10001", "less than or equal to 10000"),
        ("POOL__SIZE", "a\nb", "valid integer"),
    ],
)
def test_a_malformed_value_names_its_variable_what_it_takes_and_what_it_got(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, fix: str
) -> None:
    monkeypatch.setenv(f"OVERDRIVE_{name}", value)
    message = complaint()
    assert message.startswith(f"OVERDRIVE_{name}: ")
    assert fix in message
    assert f"(got {value!r})" in message


def test_a_malformed_argument_is_named_like_its_variable() -> None:
    assert complaint(pool={"size": 0}).startswith("OVERDRIVE_POOL__SIZE: ")
    assert complaint(pool="abc").startswith("OVERDRIVE_POOL: ")
    assert complaint(poool={}).startswith("OVERDRIVE_POOOL: ")


def test_sizes_that_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERDRIVE_PAGINATION__SIZE", "200")
    monkeypatch.setenv("OVERDRIVE_PAGINATION__SECRETS", "hush" * 4)
    message = complaint()
    assert message.startswith("OVERDRIVE_PAGINATION: ")
    assert "size (200) is larger than max_size (100)" in message
    assert "hush" not in message


def test_everything_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERDRIVE_POOL__SIZE", "abc")
    monkeypatch.setenv("OVERDRIVE_CACHE__TTL", "-1")
    message = complaint()
    assert "OVERDRIVE_POOL__SIZE: " in message
    assert "; OVERDRIVE_CACHE__TTL: " in message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("POOLSIZE", "OVERDRIVE_POOL__SIZE"),
        ("POOL_SIZE", "OVERDRIVE_POOL__SIZE"),
        ("POOL__SIEZ", "OVERDRIVE_POOL__SIZE"),
        ("POOL", "OVERDRIVE_POOL__SIZE"),
        ("DATABASEURL", "OVERDRIVE_DATABASE_URL"),
        ("CACHE_TTL", "OVERDRIVE_CACHE__TTL"),
    ],
)
def test_a_misspelt_variable_is_an_error_that_names_what_is_close(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(f"OVERDRIVE_{name}", "abc")
    message = complaint()
    assert message.startswith(f"OVERDRIVE_{name} is no setting; did you mean ")
    assert meant in message
    assert "abc" not in message


def test_a_variable_that_resembles_none_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERDRIVE_FOO", "1")
    message = complaint()
    assert message.startswith("OVERDRIVE_FOO is no setting; there are ")
    assert {"OVERDRIVE_DATABASE_URL", "OVERDRIVE_POOL__SIZE", "OVERDRIVE_PAGINATION__SECRETS"} <= set(
        message.replace(",", "").split()
    )


def test_other_variables_are_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERDRIVES", "1")
    monkeypatch.setenv("MY_OVERDRIVE_FOO", "1")
    assert Settings.load() == Settings()


def test_settings_are_frozen() -> None:
    settings = Settings.load()
    with pytest.raises(ValidationError):
        settings.redis_url = "redis://other"
    for part in (settings.pool, settings.cache, settings.log, settings.pagination):
        name = next(iter(type(part).model_fields))
        with pytest.raises(ValidationError):
            setattr(part, name, getattr(part, name))


OLD, NEW = "old secret of the app", "123456789012345678901234"


def secrets_of(settings: Settings) -> list[str]:
    return [secret.get_secret_value() for secret in settings.pagination.secrets]


def test_secrets_are_one_text_or_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secrets_of(Settings.load(pagination={"secrets": OLD})) == [OLD]
    assert secrets_of(Settings.load(pagination={"secrets": [NEW, OLD]})) == [NEW, OLD]
    for given, expected in [(OLD, [OLD]), (NEW, [NEW]), (f'["{NEW}", "{OLD}"]', [NEW, OLD]), ("[]", [])]:
        monkeypatch.setenv("OVERDRIVE_PAGINATION__SECRETS", given)
        assert secrets_of(Settings.load()) == expected


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("", "at least 16 characters"),
        ("hush", "at least 16 characters"),
        ('["hush', "is no JSON"),
        ("[1]", "valid string"),
    ],
)
def test_a_secret_that_protects_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, given: str, fix: str) -> None:
    monkeypatch.setenv("OVERDRIVE_PAGINATION__SECRETS", given)
    message = complaint()
    assert message.startswith("OVERDRIVE_PAGINATION__SECRETS")
    assert fix in message
    assert "hush" not in message


def test_secrets_are_not_shown() -> None:
    settings = Settings.load(pagination={"secrets": [NEW, OLD]})
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert NEW not in shown
        assert OLD not in shown
