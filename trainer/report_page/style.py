"""The style of the page: one column, one accent colour, light or dark as the reader's system is."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2227; --soft: #5c666f; --line: #e2e6e9; --back: #ffffff; --band: #f5f7f8; --accent: #0b6e8f;
  --c1: #b4562a; --c2: #69727a; --c3: #7a5bb0; --c4: #3d8a55; --c5: #a67c00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8eb; --soft: #98a3ac; --line: #333b42; --back: #15191c; --band: #1d2327; --accent: #58b8d9;
    --c1: #e08e62; --c2: #9aa5ad; --c3: #ae95dd; --c4: #78bd8d; --c5: #d3ac45;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; font-weight: 650 }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .6rem; font-weight: 650 }
h3 { font-size: .95rem; margin: 1.6rem 0 .4rem; padding-bottom: .2rem; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line) }
h4 { font-size: .88rem; margin: 0 0 .3rem; font-weight: 600 }
p { margin: .3rem 0 .8rem; max-width: 46rem }
.soft, .title, .legend, summary { color: var(--soft) }
.soft, .title, .legend { font-size: .88rem }
a { color: var(--accent) }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0; padding: .6rem 0; border-bottom: 1px solid var(--line) }
.remarks { margin: 1rem 0; padding: .7rem 1rem .7rem 2rem; background: var(--band); border-left: 3px solid var(--accent) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.6rem 1.8rem; margin: .8rem 0 1.4rem }
.grid > * { min-width: 0; margin: 0 }
figure { margin: 0 }
.chart > svg { display: block; width: 100%; height: auto }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--soft) }
svg .rule { stroke: var(--line); stroke-width: 1 }
svg .line { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round }
.dashed { stroke-dasharray: 6 4 } .dotted { stroke-dasharray: 1 4 }
.line.c0 { stroke: var(--accent) } .line.c1 { stroke: var(--c1) } .line.c2 { stroke: var(--c2) }
.line.c3 { stroke: var(--c3) } .line.c4 { stroke: var(--c4) } .line.c5 { stroke: var(--c5) }
.point.c0 { fill: var(--accent) } .point.c1 { fill: var(--c1) } .point.c2 { fill: var(--c2) }
.point.c3 { fill: var(--c3) } .point.c4 { fill: var(--c4) } .point.c5 { fill: var(--c5) }
.legend { list-style: none; margin: .2rem 0 0; padding: 0; line-height: 1.5 }
.legend li { display: flex; gap: .5rem; align-items: baseline }
.swatch { flex: none; width: 22px; height: 10px }
.last { margin-left: auto; font-variant-numeric: tabular-nums; color: var(--ink) }
.scroll { overflow-x: auto; margin: .2rem 0 1.4rem }
.title { margin: 1rem 0 0; max-width: none }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.4; overflow-wrap: break-word }
th, td { padding: .32rem .9rem .32rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); font-weight: 400 }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
th[scope=row] { font-weight: 550; max-width: 22rem }
thead th.number, thead th { color: var(--soft); font-size: .8rem; vertical-align: bottom; white-space: normal; max-width: 9rem; border-bottom-color: var(--soft) }
td.text { min-width: 6rem; max-width: 30rem }
tr.marked > * { background: var(--band) }
tr.marked > th { box-shadow: inset 3px 0 var(--accent); padding-left: .6rem }
details { margin: .4rem 0 1rem }
summary { cursor: pointer; font-size: .92rem }
.bar { display: inline-block; width: 7rem; height: .7rem; background: var(--line); vertical-align: baseline }
.bar > i { display: block; height: 100%; background: var(--accent) }
.picture { display: block; min-width: 40rem; width: 100%; height: auto; background: #fff }
@media (max-width: 40rem) { th[scope=row] { min-width: 7rem; overflow-wrap: anywhere } }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
"""
