"""What each scheduler's environment says, as it was seen on real ones, becomes nodes and a place to meet."""

import http.server
import threading

import pytest

from jaxmodels.errors import UserError
from jaxmodels.launch.cluster import Cluster, first_host, found

SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[017-020]",
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "2",
    "JAXMODELS_NODES": "8",
    "JAXMODELS_NODES_PER_JOB": "4",
    "JAXMODELS_JOB_INDEX": "1",
    "JAXMODELS_COORDINATOR_HOST": "run-slice-0-0.run",
}
TPU_POD = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t-0.t,t-1.t"}
MEGASCALE = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "t-0-0.t:8080",
}


@pytest.mark.parametrize(
    ("environ", "nodes", "node", "host"),
    [
        (SLURM, 4, 1, "gpu017"),
        (MPI, 2, 1, "10.96.0.1"),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": "65536.0;tcp://10.96.0.7:34911"}, 2, 1, "10.96.0.7"),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": "65536.0;tcp6://[fe80::1,2620::2]:43370"}, 2, 1, "fe80::1"),
        ({**SLURM, **MPI}, 2, 1, "10.96.0.1"),  # mpirun inside a SLURM job
        (POD, 8, 6, "run-slice-0-0.run"),
        (TPU_POD, 2, 1, "t-0.t"),
        ({**TPU_POD, **MEGASCALE}, 4, 3, "t-0-0.t"),
        ({**POD, **TPU_POD, **MEGASCALE}, 4, 3, "t-0-0.t"),  # numbered as libtpu numbers them
    ],
)
def test_nodes_are_those_that_the_scheduler_names(environ, nodes, node, host):
    cluster = found(environ)
    assert (cluster.nodes, cluster.node, cluster.host) == (nodes, node, host)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # a batch script
        {**MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        {"GCE_METADATA_IP": "127.0.0.1:1", "TPU_SKIP_MDS_QUERY": "1"},
    ],
)
def test_one_node_meets_itself_on_a_port_that_is_free(environ):
    cluster = found(environ)
    assert (cluster.nodes, cluster.node, cluster.host) == (1, 0, "127.0.0.1") and cluster.port > 1024


def test_an_address_of_ipv6_stands_in_brackets():
    assert Cluster(2, 0, "fe80::1", 20000).coordinator == "[fe80::1]:20000"
    assert Cluster(2, 0, "gpu017", 20000).coordinator == "gpu017:20000"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("vm", "vm"),
        ("vm,localhost", "vm"),
        ("gpu[001-004,009]", "gpu001"),
        ("gpu[7]-ib,login", "gpu7-ib"),
        ("rack[2-3]node[01,05]", "rack2node01"),
        ("a-b-1,c[1-2]", "a-b-1"),
    ],
)
def test_the_first_of_slurm_s_hosts_is_read_out_of_its_brackets(hosts, first):
    assert first_host(hosts) == first


def test_jobs_and_steps_that_share_a_machine_have_ports_of_their_own():
    jobs = [(job, step) for job in range(1000, 1080) for step in range(5)]
    ports = [found({**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port for job, step in jobs]
    used = [port + beside for port in ports for beside in (0, 1)]
    assert len(set(used)) == len(used) and min(used) >= 20000 and max(used) < 30000
    assert found({**SLURM, "SLURM_PROCID": "3"}).port == found(SLURM).port  # and all tasks know the same one


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**SLURM, "SLURM_PROCID": "4"}, "got node 4 of 4"),
        ({**SLURM, "SLURM_JOB_ID": "x"}, "got SLURM_JOB_ID='x', expected a whole number"),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": ""}, "up to version 4"),
        ({name: POD[name] for name in POD if name != "JAXMODELS_NODES"}, "without JAXMODELS_NODES, expected"),
        ({**TPU_POD, "MEGASCALE_NUM_SLICES": "2"}, "without MEGASCALE_COORDINATOR_ADDRESS"),
    ],
)
def test_half_an_answer_is_refused(environ, said):
    with pytest.raises(UserError, match=said):
        found(environ)


@pytest.fixture
def metadata():
    """A metadata server with these attributes; its address."""
    attributes: dict[str, str] = {}

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            known = key in attributes and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(key, "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield attributes, {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        server.shutdown()


@pytest.mark.parametrize("endpoints", ["10.1.0.2,10.1.0.3", "unknown:unknown:10.1.0.2,unknown:unknown:10.1.0.3"])
def test_a_tpu_machine_asks_its_metadata_server(metadata, endpoints):
    attributes, environ = metadata
    assert found(environ).nodes == 1  # another machine of Google's: it knows of no workers
    attributes |= {"agent-worker-number": "1", "worker-network-endpoints": endpoints}
    assert found(environ) == Cluster(2, 1, "10.1.0.2", 8482)
    attributes["tpu-env"] = (
        "ZONE: 'us-east5-b'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'\n"
        "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nWORKER_ID: '1'"
    )
    assert found(environ) == Cluster(4, 3, "10.0.0.9", 8482)


def test_a_metadata_server_that_does_not_answer_is_no_lone_machine(monkeypatch):
    monkeypatch.setattr("jaxmodels.launch.cluster._METADATA_TRIES", 1)
    with pytest.raises(UserError, match="got no answer of the metadata server"):
        found({"GCE_METADATA_IP": "127.0.0.1:1"})
