"""Commands about sites on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedpref.cli.shared import SITES, Config, Overrides, app, console, follow
from fedpref.errors import UserError, printable

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
    valid_days: Annotated[
        int, typer.Option(help="How long the root certificate is valid.", min=1)
    ] = 3650,
) -> None:
    """Make certificates, and a folder for each participant to hand over.

    Example: fedpref federation init federation --server fl.example.org --site clinic --site bank
    """
    from fedpref.sites.kits import provision

    names = [part.strip() for text in site for part in text.split(",") if part.strip()]
    kits = provision(folder, name, server, port, names, admin, valid_days)
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
    absent: Annotated[
        bool, typer.Option("--absent", help="Though no site of that name is connected.")
    ] = False,
) -> None:
    """Let the server turn a site away, from its next connection on.

    Example: fedpref federation expel school --admin federation/admin@fedpref.org
    """
    from fedpref.sites.submitted import set_admitted

    set_admitted(site, admin, False, absent=absent)
    console.print(
        f"{site} is turned away from now on. `fedpref federation admit {site}` lets it in again.",
        highlight=False,
    )


@federation.command()
def renew(
    folder: Annotated[
        Path,
        typer.Argument(help="The folder that `fedpref federation init` made.", metavar="FOLDER"),
    ],
    site: Annotated[
        list[str] | None, typer.Option(help="Whose certificate; give it for each. By default all.")
    ] = None,
    root: Annotated[
        bool, typer.Option("--root", help="A new root too, and with it everybody's.")
    ] = False,
    valid_days: Annotated[int, typer.Option(help="How long a new root is valid.", min=1)] = 3650,
) -> None:
    """Make new certificates, before the old ones end.

    Example: fedpref federation renew federation --site clinic
    """
    from fedpref.sites.kits import renew as make

    for participant, startup in make(folder, site or [], valid_days if root else None).items():
        console.print(f"{participant:24s} {startup}", highlight=False, soft_wrap=True)
    others = "Nobody reaches anybody before all have theirs." if root else "Nobody else changes."
    console.print(
        "Each folder takes the place of `startup` in its participant's kit: hand it over by a safe "
        f"way, then stop and start. {others}"
    )


@federation.command(name="status")
def federation_status(admin: Admin = ADMIN) -> None:
    """Say who is connected, the last job, and how long certificates last.

    Example: fedpref federation status --admin federation/admin@fedpref.org
    """
    from fedpref.sites.operating import certificates, expiry
    from fedpref.sites.submitted import connected

    sites, last = connected(admin)
    for one in sites:
        kit = admin.resolve().parent / one.name
        until = ""
        if (kit / "startup").is_dir():
            until = f", certificate until {min(certificates(kit).values()):%Y-%m-%d}"
        console.print(
            f"{one.name:24s} heard {one.seconds:.0f} s ago, FLARE {one.version or '?'}{until}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"{len(sites)} sites are connected; {last}.", highlight=False, soft_wrap=True)
    until = f"{min(certificates(admin).values()):%Y-%m-%d}"
    console.print(expiry(admin) or f"This kit is valid until {until}.", highlight=False)


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
    foreground: Annotated[
        bool,
        typer.Option("--foreground", help="Wait for its end, as services and containers want it."),
    ] = False,
) -> None:
    """Start a site, or the server, from its kit; it goes on in the background.

    Example: fedpref site start federation/clinic
    """
    from fedpref.sites import FUNCTIONS, RUNS, SITE, kits
    from fedpref.sites.consent import SiteFile
    from fedpref.sites.operating import expiry

    file = kit / kits.SITE_FILE
    if file.exists():
        SiteFile.load(file)
    variables = (
        {SITE: str(file.resolve())}
        if file.exists()
        else {RUNS: str(runs.resolve()), FUNCTIONS: functions}
    )
    if soon := expiry(kit):
        console.print(soon, highlight=False, soft_wrap=True)
    runs.mkdir(parents=True, exist_ok=True)
    kits.start(kit.resolve(), variables, foreground=foreground)
    if foreground:
        return
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
    """Say whether it runs, whether the server lets it in, and how long its certificate lasts.

    Example: fedpref site status federation/clinic
    """
    from fedpref.sites.operating import certificates, expiry, status

    console.print(status(kit), highlight=False, soft_wrap=True)
    until = f"{min(certificates(kit).values()):%Y-%m-%d}"
    console.print(expiry(kit) or f"Its certificates are valid until {until}.", highlight=False)


@site_app.command(name="check")
def site_check(
    kit: Kit,
    config: Annotated[
        Path | None,
        typer.Option(help="An experiment that the site is to take part in."),
    ] = None,
) -> None:
    """Look at a site before its first job: file, data, models, server, clock, disk, consent.

    Example: fedpref site check federation/clinic --config fedpdpo.yaml
    """
    from fedpref.experiments.experiment import Experiment
    from fedpref.sites.operating import checked

    experiment = None if config is None else Experiment.load(config)
    is_well = True
    for finding in checked(kit, experiment):
        is_well = is_well and finding.is_well
        mark = ("well ", "green") if finding.is_well else ("wrong", "red")
        said = Text.assemble(mark, f" {finding.what}: {printable(finding.said)}")
        console.print(said, highlight=False, soft_wrap=True)
    if not is_well:
        raise typer.Exit(2)


@site_app.command(name="forget")
def site_forget(
    kit: Kit,
    client: Annotated[str, typer.Argument(help="The client's name.", metavar="CLIENT")],
) -> None:
    """Remove what the site keeps of a client: values, own parts, answers, caches.

    Example: fedpref site forget federation/clinic patient-7
    """
    from fedpref.sites import kits
    from fedpref.sites.consent import SiteFile
    from fedpref.sites.operating import forget

    if kits.running(kit.resolve()):
        raise UserError(f"{kit}: it is running. `fedpref site stop {kit}` stops it first.")
    runs = forget(Path(SiteFile.load(kit / kits.SITE_FILE).folder), client)
    console.print(
        f"{printable(client)} is forgotten here in {', '.join(runs)}. Its rows stay where "
        "they are: take them out of the site's data. What it has added to shared adapters stays in "
        "these, at the server and at everybody who has them: a mean cannot be undone.",
        highlight=False,
        soft_wrap=True,
    )
