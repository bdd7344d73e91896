"""`lmcache-s3`: the command line. One file per command; this one only puts them together."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lmcache_s3.cli import bench
from lmcache_s3.cli.calibrate import calibrate
from lmcache_s3.cli.checkpoint import checkpoint
from lmcache_s3.cli.common import command
from lmcache_s3.cli.doctor import doctor
from lmcache_s3.cli.du import du
from lmcache_s3.cli.explain import explain
from lmcache_s3.cli.gc import gc
from lmcache_s3.cli.info import info
from lmcache_s3.cli.init import init
from lmcache_s3.cli.log import log
from lmcache_s3.cli.ls import ls
from lmcache_s3.cli.rebuild import rebuild
from lmcache_s3.cli.replay import replay_command
from lmcache_s3.cli.verify import verify
from lmcache_s3.extent import package_version

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="A KV cache for LLM serving that lives in object storage: look at it, check it, find out why it missed.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"lmcache-s3 {package_version()}")
        raise typer.Exit


for _function in (init, ls, info, du, log, verify, explain, doctor, gc, checkpoint, rebuild):
    app.command()(command(_function))
app.command()(command(calibrate, url_is_option=True))
app.command("replay")(replay_command)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """The entry point of the package's console script."""
    try:
        app()
    except KeyboardInterrupt:
        # Ctrl-C outside any command, such as during imports.
        sys.exit(130)
