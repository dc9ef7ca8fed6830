"""The command line: ``ahi-ml``. Data on stdout, talk and progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahi_ml._version import __version__
from ahi_ml.errors import AhiError, ChecksumError, ConfigError, DecodeError, UnsupportedTransferSyntaxError

if TYPE_CHECKING:
    from ahi_ml.store import DataStore

__all__ = ["app", "main"]

EXIT_ERROR, EXIT_USAGE, EXIT_PARTIAL, EXIT_INTEGRITY, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    name="ahi-ml",
    help="Medical images from AWS HealthImaging, or from a folder that behaves like it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Target = Annotated[str, typer.Argument(help="A folder (embedded store) or a 32-character data store id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no talk.")]
Region = Annotated[str | None, typer.Option(help="AWS region, for an id.")]
Profile = Annotated[str | None, typer.Option(help="AWS profile, for an id.")]
EndpointUrl = Annotated[str | None, typer.Option(help="Endpoint of a running `ahi-ml serve`, for an id.")]
Modality = Annotated[list[str] | None, typer.Option(help="Keep this modality; may be repeated.")]
StudyDate = Annotated[str | None, typer.Option(help="YYYYMMDD, or first:last.")]
IndexFile = Annotated[str, typer.Argument(help="Index file, or its URL.")]
Everything = Annotated[bool, typer.Option("--all", help="Non-primary image sets too.")]


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _print(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    sys.stdout.write((json.dumps(value, default=str) if as_json else text()) + "\n")


def _open(target: str, region: str | None, profile: str | None, endpoint_url: str | None, quiet: bool) -> DataStore:
    from ahi_ml.store import connect

    store = connect(target, region=region, profile=profile, endpoint_url=endpoint_url)
    store.progress = False if quiet else None
    return store


def _dates(text: str | None) -> Any:
    return None if text is None else tuple(text.split(":", 1)) if ":" in text else text


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where everything is kept.")] = Path("ahi-ml-demo"),
    data: Annotated[Path | None, typer.Option(help="Your own folder of DICOM, instead of the sample.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 80,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Import, search, index, split, train, open a volume, extract features: the main job in one go.

    Example: ahi-ml demo --data scans/
    """
    try:
        from ahi_ml.cli.demo import run_demo
    except ImportError as error:
        raise ConfigError(f"the demo needs more packages ({error.name}): pip install 'ahi_ml[demo]'") from error

    report = run_demo(
        folder,
        data=data,
        steps=steps,
        say=(lambda text: None) if quiet else _say,
        progress=False if quiet else None,
    )

    def text() -> str:
        lines = ["", "ahi-ml demo", *(f"  data: {line}" for line in report.provenance)]
        lines += [
            f"  imported: {report.imported_files} files, {report.failed_files} refused with a reason",
            f"  index: {report.frames:,} frames, {report.series} series, {report.patients} patients, "
            f"snapshot {report.snapshot_id[:12]}",
            f"  split by patient: {report.split_frames} frames, {report.split_patients} patients",
            f"  speed: {report.cold_frames_per_s:,.0f} frames/s cold, {report.warm_frames_per_s:,.0f} warm; "
            f"{report.verified_frames:,} frames verified, {report.unverified_frames} without a checksum",
            f"  training: {report.training}",
            f"  volume: {report.volume}",
            f"  features: {report.feature_rows} series, {report.feature_errors} of them no volume",
            f"  seconds: {report.timings_s}",
            *(f"  {name}: {path}" for name, path in report.outputs.items()),
        ]
        return "\n".join(lines)

    _print(report.as_dict(), as_json, text)


@app.command()
def serve(
    store: Annotated[Path, typer.Argument(help="Folder of the embedded store.")],
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 0,
    host: Annotated[
        str, typer.Option(help="Address to listen at. Another than this one lets other machines in.")
    ] = "127.0.0.1",
    faults: Annotated[Path | None, typer.Option(help="JSON file of fault injector knobs.")] = None,
) -> None:
    """Serve an embedded store until interrupted, and print how to reach it.

    Example: ahi-ml serve my-store > my-store.env &  (then, once it is up: source my-store.env)
    """
    from ahi_ml.local.faults import Faults
    from ahi_ml.local.files import Endpoint, StoreFolder
    from ahi_ml.local.process import environment
    from ahi_ml.local.serve import serve_folder

    try:
        knobs = Faults.parse(json.loads(faults.read_text(encoding="utf-8"))) if faults else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the faults of {faults}: {error}") from error

    def ready(endpoint: Endpoint) -> None:
        for name, value in environment(endpoint, StoreFolder.open(store).keys()).items():
            sys.stdout.write(f"export {name}={value}\n")
        sys.stdout.flush()
        _say(f"serving {store} at {endpoint.url}; interrupt to stop")

    if serve_folder(store, host=host, port=port, faults=knobs, until_stopped=True, on_ready=ready):
        raise typer.Exit(EXIT_ERROR)


@app.command("import")
def import_(
    target: Target,
    source: Annotated[str, typer.Argument(help="Folder of DICOM files, or an s3:// prefix.")],
    role_arn: Annotated[str | None, typer.Option(help="Role HealthImaging assumes (AWS).")] = None,
    output_uri: Annotated[str | None, typer.Option(help="s3:// prefix of the report (AWS).")] = None,
    staging_uri: Annotated[str | None, typer.Option(help="s3:// prefix to upload a folder to (AWS).")] = None,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Import DICOM files; exit 3 when some were refused.

    Example: ahi-ml import my-store scans/
    """
    with _open(target, region, profile, endpoint_url, quiet) as store:
        report = store.import_dicom(source, role_arn=role_arn, output_uri=output_uri, staging_uri=staging_uri)
    if not quiet:
        for failure in report.failed:
            _say(f"{failure.input_file}: {failure.reason}")
    _print(asdict(report), as_json, lambda: repr(report))
    if report.failed:
        raise typer.Exit(EXIT_PARTIAL)


@app.command()
def search(
    target: Target,
    patient_id: Annotated[str | None, typer.Option(help="Exact PatientID.")] = None,
    study_uid: Annotated[str | None, typer.Option(help="Study Instance UID.")] = None,
    series_uid: Annotated[str | None, typer.Option(help="Series Instance UID.")] = None,
    study_date: StudyDate = None,
    modality: Modality = None,
    everything: Everything = False,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List image sets. Reads no metadata and changes no storage tier.

    Example: ahi-ml search my-store --modality CT --study-date 20230101:20231231
    """
    with _open(target, region, profile, endpoint_url, quiet) as store:
        found = store.search(
            patient_id=patient_id,
            study_instance_uid=study_uid,
            series_instance_uid=series_uid,
            study_date=_dates(study_date),
            primary=None if everything else True,
        )
        summaries = [asdict(each) for each in (found.where(modality=modality) if modality else found)]

    def text() -> str:
        import pandas as pd

        names = ["image_set_id", "version_id", "modality", "study_date", "instances", "is_primary"]
        return pd.DataFrame(summaries, columns=names).to_string(index=False)

    _print(summaries, as_json, text)


@app.command()
def index(
    target: Target,
    out: Annotated[str, typer.Option("--out", "-o", help="File to write, or a URL such as s3://bucket/ct.arrow.")],
    study_date: StudyDate = None,
    modality: Modality = None,
    everything: Everything = False,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Read the metadata of image sets into an index file, with its patient key beside it.

    The key does not go to a URL: AHI_ML_PATIENT_KEY must hold one then.

    Example: ahi-ml index my-store --modality CT -o ct.arrow
    """
    from ahi_ml.index.secret import secret_for

    secret = secret_for(out)
    with _open(target, region, profile, endpoint_url, quiet) as store:
        found = store.search(study_date=_dates(study_date), primary=None if everything else True)
        found = found.where(modality=modality) if modality else found
        made = found.index(patient_key=secret)
    made.save(out)
    summary = {
        "path": out,
        "frames": len(made),
        "series": len(made.series),
        "snapshot_id": made.snapshot_id,
        "notes": made.notes,
    }
    _print(summary, as_json, lambda: repr(made))


@app.command()
def split(
    path: IndexFile,
    ratios: Annotated[list[str], typer.Argument(help="Such as train=0.8 val=0.2.")],
    by: Annotated[str, typer.Option(help="patient, study or series.")] = "patient",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Divide an index so that no patient stands in two parts; write one file each, beside it.

    Example: ahi-ml split ct.arrow train=0.8 val=0.2
    """
    from ahi_ml.index import DatasetIndex

    shares: dict[str, float] = {}
    for ratio in ratios:
        name, _, share = ratio.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ConfigError(f"{ratio!r} is not NAME=SHARE") from None
    lines = []
    stem, suffix = os.path.splitext(path)
    for name, part in DatasetIndex.load(path).split(shares, by=by, seed=seed).items():  # type: ignore[arg-type]
        file = part.save(f"{stem}.{name}{suffix}")
        lines.append(
            {
                "part": name,
                "path": str(file),
                "frames": len(part),
                "patients": int(part.series["patient_key"].nunique()),
            }
        )
    _print(
        lines,
        as_json,
        lambda: "\n".join(
            f"{each['part']}: {each['frames']:,} frames, {each['patients']} patients, {each['path']}" for each in lines
        ),
    )


@app.command()
def show(
    target: Target,
    series_uid: Annotated[str, typer.Argument(help="Series Instance UID.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write.")] = Path("volume.png"),
    window: Annotated[str | None, typer.Option(help="Window preset, such as lung.")] = None,
    reduce: Annotated[int, typer.Option(help="Resolution levels to leave out; each halves both sides.")] = 0,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Draw a montage of a series.

    Example: ahi-ml show my-store 1.2.840.1 -o series.png --window lung
    """
    from ahi_ml.display import montage
    from ahi_ml.volume import open_volume

    with _open(target, region, profile, endpoint_url, True) as store:
        montage(open_volume(store, series_uid, reduce=reduce), window=window).savefig(out, dpi=110, facecolor="black")
    sys.stdout.write(f"{out}\n")


@app.command()
def fetch(
    target: Target,
    path: IndexFile,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Bring every frame of an index into the cache, verified; exit 4 when one is not what it should be.

    Example: ahi-ml fetch my-store ct.arrow
    """
    from dataclasses import asdict

    from ahi_ml.index import DatasetIndex

    frames = DatasetIndex.load(path)
    with _open(target, region, profile, endpoint_url, quiet) as store:
        found = store.prefetch(frames)
    errors = found.errors
    counts = {name: count for name, count in asdict(found.stats).items() if not name.endswith("_s")}
    counts["errors"] = len(errors)
    for error in errors[:20]:
        _say(str(error))
    _print(counts, as_json, lambda: ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if errors:
        raise typer.Exit(EXIT_INTEGRITY if any(_is_damage(error) for error in errors) else EXIT_PARTIAL)


def _is_damage(error: BaseException) -> bool:
    """Whether bytes are not what they were: not so when nobody here can decode their kind."""
    return isinstance(error, ChecksumError | DecodeError) and not isinstance(error, UnsupportedTransferSyntaxError)


@app.command()
def features(
    target: Target,
    path: IndexFile,
    function: Annotated[str, typer.Argument(help="module:function that takes a volume and returns a dict.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Parquet file to write, or its URL.")] = "features.parquet",
    by: Annotated[str, typer.Option(help="series or frame.")] = "series",
    jobs: Annotated[int, typer.Option(help="Processes; -1 is all cores.")] = 1,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compute features of every series of an index; exit 3 when some failed.

    Example: ahi-ml features my-store ct.arrow my_module:lung_stats -o lung.parquet
    """
    from importlib import import_module

    from ahi_ml.features import extract_features
    from ahi_ml.index import DatasetIndex

    module, _, name = function.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        work = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {function!r} (module:function): {error}") from error
    with _open(target, region, profile, endpoint_url, quiet) as store:
        table = extract_features(store, DatasetIndex.load(path), work, by=by, out=out, n_jobs=jobs)  # type: ignore[arg-type]
    failed = int(table["error"].notna().sum()) if len(table) else 0
    _print(
        {"path": out, "rows": len(table), "failed": failed},
        as_json,
        lambda: f"{out}: {len(table)} rows, {failed} failed",
    )
    if failed:
        raise typer.Exit(EXIT_PARTIAL)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every cached frame.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how large the frame cache is, or clear it, with the copies of remote indexes.

    Example: ahi-ml cache --clear --yes
    """
    from ahi_ml.cache import FrameCache
    from ahi_ml.config import cache_folder, index_folder
    from ahi_ml.index.spill import clear_copies

    frames = FrameCache(cache_folder())
    if clear and (yes or typer.confirm(f"Delete every frame cached in {frames.folder}?", err=True)):
        frames.clear()
        clear_copies(index_folder())
    count, size = frames.size()
    _print(
        {"folder": str(frames.folder), "frames": count, "bytes": size},
        as_json,
        lambda: f"{frames.folder}: {count:,} frames, {size:,} bytes",
    )


def main() -> None:
    """Run the command line, with the exit codes of the documentation."""
    try:
        app(standalone_mode=True)
    except ChecksumError as error:
        _say(f"ahi-ml: {error}")
        sys.exit(EXIT_INTEGRITY)
    except ConfigError as error:
        _say(f"ahi-ml: {error}")
        sys.exit(EXIT_USAGE)
    except AhiError as error:
        _say(f"ahi-ml: {error}")
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output is gone; nothing more to say, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a file of the command line that cannot be read or written
        _say(f"ahi-ml: {error}")
        sys.exit(EXIT_ERROR)
