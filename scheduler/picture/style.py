"""Colours and rules of the page, light and dark."""

from __future__ import annotations

# Eight hues told apart with all common kinds of colour vision: Okabe and Ito, "Color Universal Design" (2008),
# their yellow and black replaced because they vanish on white and on dark grounds.
ROUTE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7a8b2f")

STYLE = """
:root { color-scheme: light dark; --page:#f6f7f9; --card:#ffffff; --ink:#1b2430; --faint:#6b7684;
  --line:#d5dae1; --region:#eceff3; --weights:#4f6d8f; --kv:#8fb3d6; --buffers:#d2a24c; --kept:#c3c9d1;
  --good:#1f8a5b; --bad:#c0432f; --compute:#4f6d8f; --memory:#8fb3d6; --link:#d2a24c; --software:#b59ac9;
  --group:#d98c7a; }
@media (prefers-color-scheme: dark) { :root { --page:#14181e; --card:#1e242c; --ink:#e4e8ee; --faint:#94a0af;
  --line:#37404c; --region:#191f26; --weights:#7e9fc6; --kv:#4f7199; --buffers:#c9973d; --kept:#48515d;
  --good:#4cc38a; --bad:#f08a76; --compute:#7e9fc6; --memory:#4f7199; --link:#c9973d; --software:#8f74a5;
  --group:#b56b59; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif; }
main { max-width:1320px; margin:0 auto; padding:24px 20px 60px; }
h1 { font-size:24px; margin:0 0 2px; }
h2 { font-size:17px; margin:34px 0 10px; }
p { margin:6px 0; max-width:80ch; }
.faint { color:var(--faint); }
.tiles { display:flex; flex-wrap:wrap; gap:12px; margin:18px 0 4px; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:10px 16px;
  min-width:128px; }
.tile b { display:block; font-size:20px; font-variant-numeric:tabular-nums; }
.tile span { color:var(--faint); font-size:13px; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; background:var(--card); border:1px solid var(--line); font-size:13.5px;
  font-variant-numeric:tabular-nums; }
th, td { padding:5px 11px; text-align:left; border-bottom:1px solid var(--line); vertical-align:top; }
th { color:var(--faint); font-weight:600; white-space:nowrap; }
td.n, th.n { text-align:right; white-space:nowrap; }
tr:last-child td { border-bottom:0; }
td.wide { min-width:240px; }
details { margin-top:10px; }
summary { cursor:pointer; color:var(--faint); padding:4px 0; }
.gain { color:var(--good); font-weight:600; }
.loss { color:var(--bad); font-weight:600; }
.split { display:flex; width:190px; height:11px; border-radius:3px; overflow:hidden; background:var(--region);
  margin-top:4px; }
.split i { display:block; height:100%; }
.keys { display:flex; flex-wrap:wrap; gap:6px 18px; font-size:13px; color:var(--faint); margin:8px 0; }
.keys i { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:6px;
  vertical-align:-1px; }
.keys i.stranded { border:1px solid var(--faint); }
svg.map { width:100%; height:auto; display:block; font:12px system-ui,-apple-system,"Segoe UI",sans-serif; }
svg.map text { fill:var(--ink); }
.region { fill:var(--region); stroke:var(--line); }
svg.map .region-title, svg.map .kind, svg.map .busy { fill:var(--faint); }
svg.map .kind, svg.map .busy { font-size:11px; }
svg.map .region-title { font-weight:600; }
svg.map .busy { text-anchor:end; }
svg.map .stage { font-size:11px; }
svg.map .idle { fill:var(--faint); font-style:italic; }
svg.map .node { font-weight:600; }
.card { fill:var(--card); stroke:var(--line); }
.way { fill:none; opacity:.85; stroke-linecap:round; }
.weights { fill:var(--weights); background:var(--weights); }
.kv { fill:var(--kv); background:var(--kv); }
.buffers { fill:var(--buffers); background:var(--buffers); }
.kept { fill:var(--kept); background:var(--kept); }
.stranded { fill:none; stroke:var(--faint); stroke-width:.7; }
.label-back { fill:var(--card); stroke:var(--line); }
svg.map .label { text-anchor:middle; font-size:11px; }
""".strip()

TIME_PARTS = (
    ("compute", "compute"),
    ("memory", "memory bandwidth"),
    ("link", "links inside the group"),
    ("software", "software"),
    ("group", "slower devices of its group"),
)  # the rest is idle
