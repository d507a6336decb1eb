# The set of chapters: which are executed, when, and the site that is made of them.
#
#   snakemake                          the book at small scale  (what `make book` calls)
#   snakemake --config scale=long      with the runs that take minutes on one thread of a processor
#   snakemake --config scale=full      with the runs that need a GPU
#   snakemake --workflow-profile profiles/slurm --config scale=full
#
# A job is asked for when a file behind a chapter is newer than its notebook; it executes if the content differs from
# what the notebook was made of, and otherwise only brings the text up to date (tools/execute.py). `update` keeps
# Snakemake from deleting the last good notebook beforehand.
import sys

sys.path.insert(0, workflow.basedir)
from tools import inputs

SCALE = config.get("scale", "small")
if SCALE not in ("small", "long", "full"):
    raise ValueError(f"scale must be small, long or full, got {SCALE}")
BOOK = "book" if SCALE == "small" else f"_build/{SCALE}/book"
SITE = "_build/html/index.html" if SCALE == "small" else f"_build/{SCALE}/_build/html/index.html"
CHAPTERS = inputs.chapters()


# On a cluster these run where you start from.
localrules:
    book,
    chapters,
    site,


rule book:
    input:
        SITE,


rule chapters:
    input:
        expand(f"{BOOK}/{{chapter}}.ipynb", chapter=CHAPTERS),


rule chapter:
    input:
        text="chapters/{chapter}.md",
        code=lambda wildcards: [str(path.relative_to(inputs.ROOT)) for path in inputs.files(wildcards.chapter)],
        # What makes a page of a text. When it changes nothing is executed: the outputs are the same.
        page=["tools/execute.py", "tools/page.py"],
    output:
        update(f"{BOOK}/{{chapter}}.ipynb"),
    wildcard_constraints:
        chapter="|".join(CHAPTERS),
    # One thread a chapter, and as many chapters at a time as there are cores: the models are small, and threads that
    # wait for each other on a busy machine cost more than they bring. It also makes sums come out alike everywhere.
    threads: 4 if SCALE == "full" else 1
    resources:
        mem_mb=64000 if SCALE == "full" else 8000,
        gpu=1 if SCALE == "full" else 0,
        runtime=15 if SCALE == "small" else 60,
    shell:
        "OMP_NUM_THREADS={threads} {sys.executable} -m tools.execute {wildcards.chapter} {output} scale={SCALE}"


rule site:
    input:
        rules.chapters.input,
        "_config.yml",
        "_toc.yml",
        "CITATION.cff",
        [str(path) for path in inputs.pages()],
    output:
        update(SITE),
    shell:
        "{sys.executable} -m tools.site {SCALE}"
