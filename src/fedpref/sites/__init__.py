"""Sites on NVIDIA FLARE 2.9, through its Collab API; all that is known of FLARE is here.

`programs` is what runs in FLARE's processes; `simulated` and `submitted` are how an experiment gets
there; `kits` makes certificates and folders for hosts; `consent` is a site's own file.
"""

# environment variables of the processes
SITE = "FEDPREF_SITE"  # at a site: its file
RUNS = "FEDPREF_RUNS"  # at the coordinator: its folder of runs
FUNCTIONS = (
    "FEDPREF_FUNCTIONS"  # at the coordinator: rewards that it may import, with commas between
)
# at a simulation's coordinator: the file in which it tells what happens; elsewhere its log has it
TELLS = "FEDPREF_TELLS"

SAYS = "fedpref says "  # begins what a coordinator tells in its log
