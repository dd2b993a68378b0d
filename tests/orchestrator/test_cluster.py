"""Cluster files: which one is meant, what stands in it, what is refused and in which words."""

import pytest

from orchestrator.cluster import (
    INSIDE,
    Cluster,
    ClusterFacts,
    NodeFacts,
    check_storage,
    cluster_at,
    home,
    load_cluster,
)
from orchestrator.errors import ClusterError, SpecError

from .submit.job import make_job, write_inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, and no cluster named by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYPEFT_CLUSTER", raising=False)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def address(folder, name):
    return write(folder / "clusters" / f"{name}.yaml", f"kind: address\naddress: http://{name}:8265\n")


def refused(*arguments, **keywords) -> str:
    with pytest.raises(SpecError) as caught:
        load_cluster(*arguments, **keywords)
    return str(caught.value)


def test_local_needs_no_file(folder):
    cluster = load_cluster()
    assert (cluster.name, cluster.kind, cluster.path) == ("local", "local", None)
    assert cluster.storage == str(home() / "runs")
    assert cluster.registry == str(home() / "registry")
    assert (cluster.serve.host, cluster.serve.port) == ("127.0.0.1", 8000)


def test_the_flag_goes_before_the_environment_before_the_job_before_local(folder, monkeypatch):
    for name in ("flag", "environment", "job"):
        address(folder, name)
    monkeypatch.setenv("RAYPEFT_CLUSTER", "environment")
    assert load_cluster("flag", "job").name == "flag"
    assert load_cluster(None, "job").name == "environment"
    monkeypatch.delenv("RAYPEFT_CLUSTER")
    assert load_cluster(None, "job").name == "job"
    assert load_cluster(None, None).name == "local"


def test_a_name_is_looked_for_beside_the_job_and_in_the_working_directory(folder):
    jobs = folder / "elsewhere" / "jobs"
    jobs.mkdir(parents=True)
    address(folder, "here")
    address(folder / "elsewhere", "there")  # beside the folder of the jobs, as in this repository
    assert load_cluster("here").address == "http://here:8265"
    assert load_cluster("there", beside=jobs).address == "http://there:8265"
    assert "there is no cluster 'there'" in refused("there")


def test_a_path_and_a_bare_address_name_a_cluster(folder):
    path = address(folder, "office")
    assert load_cluster(str(path)).name == "office"
    assert load_cluster("clusters/office.yaml").name == "office"
    assert load_cluster("http://head:8265/").address == "http://head:8265"
    assert cluster_at("https://[::1]:8265").kind == "address"


def test_a_local_file_may_change_the_defaults(folder):
    write(folder / "clusters" / "local.yaml", "kind: local\nstorage: runs\nserve: {port: 9000}\n")
    cluster = load_cluster("local")
    assert cluster.storage == str(folder / "clusters" / "runs")
    assert cluster.serve.port == 9000


def test_storage_that_is_named_is_taken_to_be_seen_by_all_nodes(folder):
    head = "kind: address\naddress: http://head:8265\n"
    assert not load_cluster(str(write(folder / "a.yaml", head))).shared
    both = head + "storage: s3://bucket/runs/\nregistry: /mnt/shared/adapters\n"
    cluster = load_cluster(str(write(folder / "b.yaml", both)))
    assert cluster.shared
    assert (cluster.storage, cluster.registry) == ("s3://bucket/runs", "/mnt/shared/adapters")


def test_a_job_on_a_cluster_knows_that_it_is_inside(folder):
    path = write(folder / "cluster.yaml", f"kind: address\naddress: {INSIDE}\n")
    assert load_cluster(str(path)).is_inside
    assert not cluster_at("http://head:8265").is_inside


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: adress\n", "c.yaml:1 kind: 'adress' is not a kind of cluster. Closest: 'address'."),
        ("storage: s3://b\n", "a cluster file needs a kind. One of: local, address, launcher, kuberay."),
        (
            "kind: local\nstorge: x\n",
            "c.yaml:2 storge: 'storge' is not a key of a cluster file. Closest: 'storage'.",
        ),
        (
            "kind: local\nserve: {prt: 1}\n",
            "c.yaml:2 serve.prt: 'prt' is not a key of a cluster file. Closest: 'port'.",
        ),
        (
            "kind: local\nserve: {port: 99999}\n",
            "serve.port: 99999 is not a port. Write a number from 1 to 65535.",
        ),
        ("kind: local\nstorage: 3\n", "storage: 3 is not text."),
        ("kind: local\ninstall: perhaps\n", "install: 'perhaps' is not true or false."),
        ("kind: address\n", "kind address needs 'address'. Write address: http://HOST:8265"),
        ("kind: launcher\n", "kind launcher needs 'launcher'. Write launcher: my-ray.yaml"),
        ("kind: kuberay\n", "kind kuberay needs 'manifest'. Write manifest: rayjob.yaml"),
        (
            "kind: address\naddress: ray://head:10001\n",
            "jobs go to the dashboard's address, http://HOST:8265.",
        ),
        ("kind: address\naddress: head\n", "c.yaml:2 address: 'head' is not an address."),
        ("kind: local\naddress: http://h:1\n", "c.yaml:2 address: kind local has no 'address'."),
        ("kind: launcher\nlauncher: ray.yaml\n", "launcher: there is no file"),
        ("kind: address\naddress: http://h:1\nstorage: runs\n", "'runs' is a relative folder"),
        ("kind: local\nkind: local\n", "the key stands twice, on line 1 and on line 2."),
        ("kind: [\n", "not YAML"),
        ("", "the file is empty."),
    ],
)
def test_what_is_wrong_is_said_with_its_place(folder, text, message):
    write(folder / "c.yaml", text)
    assert message in refused("c.yaml")


def test_all_that_is_wrong_is_said_at_once(folder):
    write(folder / "c.yaml", "kind: local\na: 1\nb: 2\n")
    assert len(refused("c.yaml").splitlines()) == 2


def test_an_unknown_name_lists_what_there_is(folder):
    address(folder, "office")
    write(folder / "clusters" / "office-ray.yaml", "cluster_name: not ours\n")
    message = refused("ofice")
    assert message.startswith("--cluster: there is no cluster 'ofice'. Closest: 'office'.")
    assert "Known: local, office." in message
    assert refused(None, "nowhere.yaml").startswith("cluster: there is no cluster 'nowhere.yaml'.")


def test_a_forwarded_port_keeps_the_clusters_places(folder):
    both = "kind: address\naddress: http://head:8265\nstorage: s3://b/r\nregistry: s3://b/a\n"
    write(folder / "c.yaml", both)
    moved = load_cluster("c.yaml").at("http://127.0.0.1:9000/")
    assert (moved.address, moved.storage, moved.shared) == ("http://127.0.0.1:9000", "s3://b/r", True)
    assert load_cluster("local").at("http://head:8265") == cluster_at("http://head:8265")
    with pytest.raises(SpecError, match="--address: 'head' is not an address"):
        load_cluster("c.yaml").at("head")


def test_several_nodes_are_those_that_may_come_too():
    node = NodeFacts(cpus=4)
    assert not ClusterFacts((node,), 4, 0).several_nodes
    assert ClusterFacts((node,), 8, 0, max_nodes=2).several_nodes
    assert ClusterFacts((node, node), 8, 0).several_nodes


def test_a_cluster_is_a_plain_value():
    cluster = Cluster("a", "local", "/runs", "/adapters")
    assert cluster == Cluster("a", "local", "/runs", "/adapters")
    assert cluster.serve.port == 8000


BARE = cluster_at("http://head:8265")
SHARED = Cluster("c", "address", "s3://b/r", "s3://b/a", shared=True)
ONE = ClusterFacts((NodeFacts(cpus=4),), 4, 0)
TWO = ClusterFacts((NodeFacts(cpus=4),) * 2, 8, 0, max_nodes=2)


def test_several_nodes_without_shared_storage_are_refused(folder):
    write_inputs(folder)
    with pytest.raises(ClusterError) as caught:
        check_storage(make_job(), BARE, TWO)
    assert str(caught.value) == (
        "http://head:8265: the cluster has several nodes (up to 2), and nothing names storage that all of them "
        "see: checkpoints and adapters written on one node are not found on another, nor is the base 'base'. "
        "Name shared storage in a cluster file: storage: s3://BUCKET/runs and registry: s3://BUCKET/adapters, "
        "or folders that every node mounts; put a local base there too."
    )


def test_one_node_or_shared_storage_is_enough(folder):
    check_storage(make_job(), BARE, ONE)
    check_storage(make_job(), SHARED, TWO)
    with pytest.raises(ClusterError):  # the negative control: two nodes and no shared storage
        check_storage(make_job(), BARE, TWO)


def test_a_relative_storage_path_is_refused_on_a_cluster_and_fine_here(folder):
    spec = make_job(storage={"path": "./runs"})
    with pytest.raises(SpecError) as caught:
        check_storage(spec, SHARED, ONE)
    assert str(caught.value) == (
        "storage.path: './runs' is a relative folder, which on a cluster is gone with the job. Write a URL "
        "(s3://bucket/folder) or an absolute folder that every node mounts."
    )
    check_storage(spec, load_cluster(), ONE)
    check_storage(make_job(storage={"path": "/mnt/runs"}), SHARED, TWO)
