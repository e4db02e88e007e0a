# How jobs run: resources that grow with attempts, GPUs, software; locks of killed runs; what is checked before the first job, and shown
# after the last.

import fcntl
import shutil
import socket

from snakemake.io import regex_from_filepattern, strip_wildcard_constraints

# Heavy jobs are repeated once. On a cluster (which counts jobs) its profile says how often, by new submissions with more memory and time.
RETRIES = None if workflow.remote_exec or workflow.resource_settings.nodes else 1

NO_RUN = ("plan", "preflight")  # rules that only report, and need nothing that a run needs


def times_attempt(amount):
    """A resource that grows with every attempt; `amount` is a number or a function of the job's wildcards."""
    return lambda wildcards, attempt: attempt * (amount(wildcards) if callable(amount) else amount)


def site_setting(name):
    """What a profile sets for its site under default-resources; None where it does not."""
    found = (workflow.resource_settings.default_resources or {}).get(name)
    return getattr(found, "raw", found)


def gpus(count):
    """A job's GPUs as resources. A cluster is asked for `gpu`; or for `gres`, where its profile names one in gpu_gres."""
    number = count if callable(count) else lambda wildcards: count
    gres, partition = site_setting("gpu_gres"), site_setting("gpu_partition")
    needed = {"gres": lambda wildcards: f"{gres}:{number(wildcards)}" if number(wildcards) else ""} if gres else {"gpu": count}
    if partition:
        needed["slurm_partition"] = lambda wildcards: partition if number(wildcards) else site_setting("slurm_partition") or ""
    return needed


def gpu_rules():
    """Names of the rules whose jobs use GPUs."""
    return [one.name for one in workflow.rules if GPU and any(one.resources.get(name) not in (None, 0) for name in ("gpu", "gres"))]


def gpu_limit():
    """The GPUs that a job may be given at most by --resources; None where that sets no limit."""
    return workflow.global_resources["gpu"].value if "gpu" in workflow.global_resources else None


def software():
    """By rule the file that names its packages; nothing where jobs do not run in this environment."""
    other = {str(method) for method in workflow.deployment_settings.deployment_method}
    return {} if other else {one.name: str(HERE / "envs" / Path(one.conda_env).name) for one in workflow.rules if one.conda_env}


def files_of_rules(wildcards):
    """By rule, what its files and its benchmarks are called."""
    return {
        one.name: {
            "outputs": [regex_from_filepattern(str(file)) for file in one.output],
            "benchmark": strip_wildcard_constraints(str(one.benchmark or "")),
        }
        for one in workflow.rules
    }


def recover_from_a_killed_run():
    """Let a run start after one that was killed (-9) together with its clean-up.

    A run holds .snakemake/alive for as long as it lives; the kernel releases it however the run ends. Who gets hold of it and finds
    Snakemake's own locks, left by this same machine, knows that nobody needs them any more.
    """
    folder = Path(".snakemake")
    folder.mkdir(exist_ok=True)
    handle = (folder / "alive").open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    handle.seek(0)
    if handle.read() == socket.gethostname():
        shutil.rmtree(folder / "locks", ignore_errors=True)
    handle.truncate(0)
    handle.write(socket.gethostname())
    handle.flush()
    return handle


if workflow.is_main_process and not workflow.dryrun:
    alive = recover_from_a_killed_run()


onstart:
    from crfm_core.planning.jobs import Job

    jobs = [Job(job.rule.name, dict(job.wildcards.items())) for job in workflow.dag.needrun_jobs() if job.rule.name not in NO_RUN]
    if jobs:
        from crfm_core.planning.rates import read_rates
        from crfm_core.planning.preflight import PendingRun, check_run

        found = check_run(
            PendingRun(
                settings,
                datasets,
                jobs,
                read_rates(HERE / "configs" / "rates.yaml"),
                frozenset(gpu_rules()),
                gpu_limit(),
                local=workflow.local_exec,
                software={name: Path(file) for name, file in software().items()},
            )
        )
        if found.problems:
            raise WorkflowError(found.text())
        for note in found.notes():
            print(note, file=sys.stderr)


onsuccess:
    ran = any(job.rule.name not in NO_RUN for job in workflow.dag.jobs)
    if ran and Path(results.report()).is_file():
        for table in experiment.tables:
            print(Path(results.table_text(table)).read_text())
        print(f"report: {Path(results.report()).resolve()}")
