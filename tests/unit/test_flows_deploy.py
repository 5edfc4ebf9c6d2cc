"""The deployment file, read strictly: what is refused before a server is asked."""

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.automations import check_automation, resolve_automation
from flows.deploy import deploy
from flows.deployment_file import read_automations, read_deployments
from flows.desired import desired_deployments, desired_pools
from memmc import __version__
from memmc.errors import ConfigError, UsageError
from memmc.pipeline.approval import PERSON

INFRA = Path(__file__).parents[2] / "infra"
FILE = INFRA / "prefect.yaml"


@pytest.fixture
def written(tmp_path):
    """The shipped file, changed and written again."""

    def write(change):
        content = YAML(typ="safe").load(FILE.read_text())
        change(content)
        path = tmp_path / "prefect.yaml"
        with path.open("w") as file:
            YAML(typ="safe").dump(content, file)
        return path

    return write


def check(path, pool=None):
    content = read_deployments(path)
    return desired_deployments(content, desired_pools(content, Path("/srv/memmc")), pool)


def test_the_shipped_file_holds_and_says_all_that_is_asked_of_it():
    wanted = check(FILE)
    assert {"ingest/arrivals", "score/new-scans", "train/on-demand", "maintenance/weekly"} <= wanted.keys()
    for each in wanted.values():
        assert each.spec.concurrency_limit is not None
        assert all(schedule.timezone for schedule in each.spec.schedules)
        assert not {"source", "labels_file"} & each.spec.parameters.keys()
    assert {each.spec.work_pool.name for each in check(FILE, "memmc-kubernetes").values()} == {"memmc-kubernetes"}


def test_the_weekly_report_waits_for_its_turn():
    wanted = check(FILE)
    report = wanted["score/weekly-report"].spec
    assert report.parameters == {"cohort": "cxr", "report": True, "evaluate": True}
    assert report.concurrency_limit.collision_strategy == "ENQUEUE"
    assert [each.slug for each in wanted["score/new-scans"].spec.schedules] == ["hourly"]


def test_whoever_answers_for_a_challenger_is_asked_for_their_name():
    schema = check(FILE)["approve/on-demand"].parameter_schema
    assert set(schema["required"]) == {"cohort", "name"}
    assert schema["properties"]["name"]["pattern"] == PERSON


def put(section, number, key, value):
    return lambda content: content[section][number].__setitem__(key, value)


BAD_SCHEDULE = {"cron": "99 * * * *", "timezone": "UTC", "slug": "x"}
REFUSED = {
    "unknown key": (put("deployments", 0, "concurency_limit", 1), "concurency_limit: Extra inputs"),
    "unknown top": (lambda content: content.__setitem__("deploments", []), "deploments: Extra inputs"),
    "no owner": (put("deployments", 0, "tags", ["memmc"]), "owner:NAME"),
    "not ours": (put("deployments", 0, "tags", ["owner:imaging"]), "'memmc'"),
    "no such flow": (put("deployments", 0, "entrypoint", "flows.ingest.nothing"), "there is no flow"),
    "no such parameter": (put("deployments", 0, "parameters", {"cohrt": "cxr"}), "no parameter 'cohrt'"),
    "cohort is no name": (put("deployments", 0, "parameters", {"cohort": "DOE^JANE"}), "parameter cohort"),
    "parameter missing": (put("deployments", 0, "parameters", {}), "'cohort' is a required property"),
    "unknown setting": (
        put("deployments", 0, "parameters", {"cohort": "cxr", "config": {"score": {"pases": 4}}}),
        "score.passes",
    ),
    "cron": (put("deployments", 0, "schedules", [BAD_SCHEDULE]), "schedule x"),
    "timezone": (put("deployments", 0, "schedules", [BAD_SCHEDULE | {"cron": "0 0 * * *", "timezone": "Mars"}]), "x"),
    "strategy": (
        put("deployments", 0, "concurrency_limit", {"limit": 1, "collision_strategy": "DROP"}),
        "collision_strategy",
    ),
    "unknown job variable": (
        put("deployments", 0, "work_pool", {"name": "memmc-process", "job_variables": {"image": "x"}}),
        "no job variable 'image'",
    ),
    "job variable's type": (put("work_pools", 1, "variables", {"finished_job_ttl": "soon"}), "finished_job_ttl"),
    "pull": (lambda content: content.__setitem__("pull", [{"prefect.x": {}}]), "pull"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_with_its_name(written, change, words):
    with pytest.raises(ConfigError, match=words):
        check(written(change))


@pytest.mark.parametrize("place", ["source", "labels_file"])
def test_places_are_no_parameters(written, place):
    with pytest.raises(UsageError, match=f"'{place}' would be shown"):
        check(written(put("deployments", 0, "parameters", {"cohort": "cxr", place: "/data/doe"})))


@pytest.mark.parametrize(("section", "key"), [("source", "uri"), ("source", "labels_file"), ("deid", "key_file")])
def test_settings_that_name_a_place_are_no_parameters(written, section, key):
    parameters = {"cohort": "cxr", "config": {section: {key: "/data/doe"}}}
    with pytest.raises(UsageError, match=f"'{section}.{key}' would be shown"):
        check(written(put("deployments", 0, "parameters", parameters)))


def test_settings_that_are_none_are_refused_before_they_are_searched_for_places(written):
    with pytest.raises(ConfigError, match="source"):
        check(written(put("deployments", 0, "parameters", {"cohort": "cxr", "config": {"source": "x"}})))


def test_credentials_are_no_parameters(written):
    config = {"cohort": "cxr", "config": {"tracking": {"uri": "http://me:secret@host"}}}
    with pytest.raises(UsageError, match="user or password"):
        check(written(put("deployments", 0, "parameters", config)))


def test_a_key_that_is_said_twice_is_refused(tmp_path):
    path = tmp_path / "prefect.yaml"
    path.write_text(FILE.read_text() + "\nname: again\n")
    with pytest.raises(ConfigError, match="not YAML"):
        read_deployments(path)


def test_nothing_is_asked_of_a_server_when_the_file_is_wrong(written, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody is there
    with pytest.raises(ConfigError):
        deploy(written(put("deployments", 0, "tags", [])))


def test_a_server_must_be_named(monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(UsageError, match="PREFECT_API_URL"):
        deploy(FILE)


def test_a_process_pool_works_where_the_lake_is():
    content = read_deployments(FILE)
    template = desired_pools(content, Path("/srv/memmc"))["memmc-process"].base_job_template
    assert template["variables"]["properties"]["working_dir"]["default"] == "/srv/memmc"


def job_of(pool, env):
    """Render a run's Job as the worker of Prefect's own package does; it refuses a manifest that is none."""
    from prefect.utilities.templating import apply_values
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    properties = pool.base_job_template["variables"]["properties"]
    values = {name: each["default"] for name, each in properties.items() if "default" in each}
    values |= {"name": "ingest", "command": "prefect flow-run execute", "env": values["env"] | env}
    return KubernetesWorkerJobConfiguration(**apply_values(pool.base_job_template["job_configuration"], values))


def test_a_kubernetes_job_is_what_a_hospital_lets_in():
    pools = desired_pools(read_deployments(FILE), Path("/srv"))
    job = job_of(pools["memmc-kubernetes"], {"PREFECT_API_URL": "http://prefect/api"}).job_manifest
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (pod["serviceAccountName"], job["metadata"]["namespace"]) == ("memmc-flow", "memmc")
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["image"] == f"memmc:{__version__}"  # a node that holds an older image would keep to `latest`
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "8Gi"}
    assert job["spec"]["ttlSecondsAfterFinished"] == 3600
    assert (
        container["env"].items()
        >= {
            "MEMMC_CONFIG": "/etc/memmc/memmc.toml",
            "HOME": "/work",
            "PREFECT_API_URL": "http://prefect/api",
        }.items()
    )
    assert "{{" not in str(job)  # every variable has found its value


def test_a_manifest_that_is_no_job_is_seen(written):
    def change(content):
        content["work_pools"][1]["job_manifest"]["spec"]["template"]["spec"].pop("containers")

    pools = desired_pools(read_deployments(written(change)), Path("/srv"))
    with pytest.raises(ValueError, match="containers"):
        job_of(pools["memmc-kubernetes"], {})


def test_the_shipped_automations_hold_and_carry_our_tag():
    automations = read_automations(INFRA / "automations.yaml").automations
    assert automations
    for each in automations:
        check_automation(each)


NOTIFY = {"type": "send-notification", "block": "slack-webhook/memmc-alerts", "subject": "x", "body": "y"}
TRIGGER = {"type": "event", "posture": "Reactive", "expect": ["memmc.alarm.*"], "threshold": 1, "within": 0}


def test_an_action_without_its_block_waits_and_the_others_do_not():
    other = {"type": "do-nothing"}
    written = {"name": "alarm", "trigger": TRIGGER, "actions": [NOTIFY, other]}
    resolved = resolve_automation(written, lambda _: None, lambda _: None)
    assert resolved.waits_for == ["slack-webhook/memmc-alerts"]
    assert [action.type for action in resolved.wanted.actions] == ["do-nothing"]
    assert resolved.wanted.tags == ["memmc"]
    assert resolve_automation(written | {"actions": [NOTIFY]}, lambda _: None, lambda _: None).wanted is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"descripton": "x"}, "descripton"),
        ({"trigger": TRIGGER | {"treshold": 2}}, "trigger.treshold"),
        ({"trigger": TRIGGER | {"posture": "Sideways"}}, "posture"),
        ({"actions": [NOTIFY | {"block": "memmc-alerts"}]}, "TYPE/NAME"),
        ({"actions": [NOTIFY | {"boddy": "x"}]}, "boddy"),
    ],
)
def test_an_automation_that_prefect_would_half_understand_is_refused(changed, words):
    check_automation({"name": "alarm", "trigger": TRIGGER, "actions": [NOTIFY]})
    with pytest.raises(ConfigError, match=words):
        check_automation({"name": "alarm", "trigger": TRIGGER, "actions": [NOTIFY], **changed})


def test_an_automation_runs_only_deployments_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    shutil.copy(FILE, tmp_path / "prefect.yaml")
    with (tmp_path / "automations.yaml").open("w") as file:
        action = {"type": "run-deployment", "deployment": "ingest/nightly"}
        YAML().dump({"automations": [{"name": "again", "trigger": TRIGGER, "actions": [action]}]}, file)
    with pytest.raises(ConfigError, match="ingest/nightly"):
        deploy(tmp_path / "prefect.yaml")
