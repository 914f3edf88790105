"""Commands about sites on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpref.cli.shared import SITES, Config, Overrides, app, console, follow

federation = typer.Typer(
    help="Make a federation of sites.\n\nExample: fedpref federation init federation --server "
    "fl.example.org --site clinic --site bank",
    no_args_is_help=True,
)
site_app = typer.Typer(
    help="Start and stop a site, or the server.\n\nExample: fedpref site start federation/clinic",
    no_args_is_help=True,
)
app.add_typer(federation, name="federation", rich_help_panel=SITES)
app.add_typer(site_app, name="site", rich_help_panel=SITES)
ADMIN = Path("federation/admin@fedpref.org")
Admin = Annotated[
    Path, typer.Option(help="The kit of who submits, a folder that `fedpref federation init` made.")
]
Kit = Annotated[Path, typer.Argument(help="A site's or the server's folder.", metavar="KIT")]


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    admin: Admin = ADMIN,
    output: Annotated[
        Path | None, typer.Option(help="The run directory; by default runs/NAME-TIME.")
    ] = None,
) -> None:
    """Run an experiment over sites that have been started, each with its own data.

    Example: fedpref submit fedpdpo --admin federation/admin@example.org
    """
    from fedpref.experiments.experiment import Experiment
    from fedpref.experiments.rounds import new_directory
    from fedpref.runs.launch import happenings

    experiment = Experiment.load(config, [*(overrides or ()), "engine=flare"])
    folder = new_directory(experiment, output)
    folder.refuse_existing()
    follow(happenings(experiment, folder, admin=admin), folder)


@federation.callback()
def of_federation() -> None:
    """Make a federation of sites."""


@federation.command()
def init(
    folder: Annotated[
        Path, typer.Argument(help="Where kits go; it must not be there yet.", metavar="FOLDER")
    ],
    site: Annotated[
        list[str],
        typer.Option(
            help="A site's name; give it for each.", prompt="Names of sites, with commas between"
        ),
    ],
    server: Annotated[
        str,
        typer.Option(
            help="The host name by which sites reach the coordinator.",
            prompt="Host name of the server",
        ),
    ],
    port: Annotated[int, typer.Option(help="The one port that must be open there.")] = 8002,
    admin: Annotated[
        str, typer.Option(help="Who submits experiments, as an address.")
    ] = "admin@fedpref.org",
    name: Annotated[str, typer.Option(help="The federation's name.")] = "federation",
) -> None:
    """Make certificates, and a folder for each participant to hand over.

    Example: fedpref federation init federation --server fl.example.org --site clinic --site bank
    """
    from fedpref.sites.kits import provision

    names = [part.strip() for text in site for part in text.split(",") if part.strip()]
    kits = provision(folder, name, server, port, names, admin)
    for participant, kit in kits.items():
        console.print(f"{participant:24s} {kit}", highlight=False, soft_wrap=True)
    console.print(
        "Hand each over by a safe way, edit each site's site.yaml, then: fedpref site start "
        "FOLDER (the server's too)."
    )


@federation.command()
def add(
    folder: Annotated[
        Path,
        typer.Argument(help="The folder that `fedpref federation init` made.", metavar="FOLDER"),
    ],
    site: Annotated[str, typer.Option(help="The new site's name.")],
) -> None:
    """Make the kit of one more site; nobody else's changes.

    Example: fedpref federation add federation --site school
    """
    from fedpref.sites.kits import add as make

    console.print(f"{site}: {make(folder, site)}", highlight=False, soft_wrap=True)


@federation.command()
def expel(
    site: Annotated[str, typer.Argument(help="The site's name.", metavar="SITE")],
    admin: Admin = ADMIN,
) -> None:
    """Let the server turn a site away, from its next connection on.

    Example: fedpref federation expel school --admin federation/admin@fedpref.org
    """
    from fedpref.sites.submitted import set_admitted

    set_admitted(site, admin, False)
    console.print(
        f"{site} is turned away from now on. `fedpref federation admit {site}` lets it in again.",
        highlight=False,
    )


@federation.command()
def admit(
    site: Annotated[str, typer.Argument(help="The site's name.", metavar="SITE")],
    admin: Admin = ADMIN,
) -> None:
    """Let a site that was expelled in again.

    Example: fedpref federation admit school --admin federation/admin@fedpref.org
    """
    from fedpref.sites.submitted import set_admitted

    set_admitted(site, admin, True)
    console.print(f"{site} may take part again.", highlight=False)


@site_app.command(name="start")
def site_start(
    kit: Kit,
    runs: Annotated[Path, typer.Option(help="Where the server keeps runs.")] = Path("runs"),
    functions: Annotated[
        str,
        typer.Option(
            help="Rewards that the server may import: module:function, with commas between."
        ),
    ] = "",
) -> None:
    """Start a site, or the server, from its kit; it goes on in the background.

    Example: fedpref site start federation/clinic
    """
    from fedpref.sites import FUNCTIONS, RUNS, SITE, kits
    from fedpref.sites.consent import SiteFile

    file = kit / kits.SITE_FILE
    if file.exists():
        SiteFile.load(file)
    variables = (
        {SITE: str(file.resolve())}
        if file.exists()
        else {RUNS: str(runs.resolve()), FUNCTIONS: functions}
    )
    runs.mkdir(parents=True, exist_ok=True)
    kits.start(kit.resolve(), variables)
    console.print(
        f"{kit.name} is starting; its log: {kit}/{kits.LOG}", highlight=False, soft_wrap=True
    )


@site_app.command(name="stop")
def site_stop(kit: Kit) -> None:
    """Stop it, with the jobs that it runs.

    Example: fedpref site stop federation/clinic
    """
    from fedpref.sites import kits

    kits.stop(kit.resolve())
    console.print(f"{kit.name} is stopped.", highlight=False)


@site_app.command(name="status")
def site_status(kit: Kit) -> None:
    """Say whether it runs.

    Example: fedpref site status federation/clinic
    """
    from fedpref.sites import kits

    console.print(
        f"{kit.name} {'is running' if kits.running(kit.resolve()) else 'is not running'}.",
        highlight=False,
    )
