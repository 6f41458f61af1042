"""Many files on a cluster of Ray: three machines, played by this one, of which one is lost in the middle."""

import json

import pytest
from spoiled import with_bytes

import phi3_jax
from phi3_jax.infer import Options, Sampling, generate
from phi3_jax.infer.serving.batch import Defaults
from phi3_jax.infer.serving.batch.ray_pipeline import FolderRun, find_inputs
from phi3_jax.infer.serving.batch.workers import Plan

ray = pytest.importorskip("ray", reason="ray is not installed: make test-ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own
COUNT, SEED, CHUNK = 40, 3, 16


@pytest.fixture(scope="module")
def cluster():
    """A head without work, and three nodes; one that is lost is noticed in seconds."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        checks = {"health_check_period_ms": 1000, "health_check_failure_threshold": 10}
        head = {"num_cpus": 0, "_system_config": checks, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        nodes = [cluster.add_node(num_cpus=2) for _ in range(3)]
        ray.init(cluster.address, logging_level="error", log_to_driver=False)
        yield cluster, nodes
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"max_position_embeddings": 128, "num_hidden_layers": 1}
    small = with_bytes(tiny, tmp_path_factory.mktemp("tokenizer"), **sizes)
    phi3_jax.save(small, folder / "model")
    return folder / "model"


def machines_at_work():
    from ray._private.state import actors

    return {
        actor["Address"]["NodeID"]
        for actor in actors().values()
        if actor["State"] == "ALIVE" and "MapWorker" in actor["ActorClassName"]
    }


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_worker_that_cannot_load_the_model_is_told_in_one_line(cluster, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}')
    (tmp_path / "out").mkdir()
    plan = Plan({"path": str(tmp_path / "absent")}, Defaults(5), Sampling())
    run = FolderRun(find_inputs(str(tmp_path / "a.jsonl")), tmp_path / "out", plan, {}, lambda *_: None)
    with pytest.raises(OSError, match=r"\Athe cluster has failed, and the same command goes on: [^\n]*absent[^\n]*\Z"):
        list(run.answer(cluster[0].address, 1))


def test_a_lost_machine_costs_no_answer(cluster, model, tmp_path):
    made, nodes = cluster
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("a", "b"):
        lines = [{"prompt": f"{name}{i}" * (1 + i % 7), "temperature": i % 2, "id": i} for i in range(COUNT)]
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    api = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "temperature": 0}}
    (tmp_path / "in" / "c.jsonl").write_text(json.dumps(api))
    plan = Plan({"path": str(model)}, Defaults(50), Sampling(seed=SEED), slots=2, chunk=CHUNK)

    def run():
        return FolderRun(find_inputs(str(tmp_path / "in/*.jsonl")), tmp_path / "out", plan, {}, lambda *_: None)

    first, written = run(), 0
    assert (first.total, first.done) == (2 * COUNT + 1, 0)
    answers = first.answer(made.address, None)
    for written, _ in enumerate(answers, start=1):
        if written == 3:
            lost = next(node for node in nodes if node.node_id in machines_at_work())
            made.remove_node(lost, allow_graceful=False)
        if written == COUNT:
            answers.close()  # as a signal does
            break
    assert lost.node_id not in machines_at_work()
    second = run()
    assert second.done == written
    assert sum(1 for _ in second.answer(made.address, 1)) == 2 * COUNT + 1 - written
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.jsonl", "b.jsonl", "c.jsonl"}
    assert run().done == 2 * COUNT + 1
    checkpoint = phi3_jax.load(model)
    for name in ("a", "b"):
        for i, line in enumerate(lines_of(tmp_path / "out" / f"{name}.jsonl")):
            sampling = Sampling(temperature=i % 2, seed=SEED + i)
            prompt = f"{name}{i}" * (1 + i % 7)
            (alone,) = generate(checkpoint, prompt, 50, sampling=sampling, options=Options(prefill_chunk=CHUNK))
            assert (line["id"], line["token_ids"], line["text"]) == (i, alone.token_ids, alone.text)
    (answer,) = lines_of(tmp_path / "out" / "c.jsonl")
    (alone,) = generate(checkpoint, "a", 16, options=Options(prefill_chunk=CHUNK))
    assert answer["response"]["body"]["choices"][0]["text"] == alone.text
