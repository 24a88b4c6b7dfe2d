#!/bin/sh
# The last lines of the demo: where its result lies, and what comes next.
set -eu
cat <<END

The report:      $(ls "$1"/out/*/report.html)   (open it in a browser)
Your own CT:     .venv/bin/ctflow run -i YOUR_FOLDER -o OUT
Your own model:  .venv/bin/ctflow run -i YOUR_FOLDER -o OUT -m YOUR_BUNDLE
More:            README.md, docs/
END
