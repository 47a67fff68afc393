"""The look of a report, beside that of all Weft's pages (``weft.preview.html``)."""

STYLE = """
:root { --good: #0b6b2e; --bad: #b3261e; --accent: #2f66d0; --eval-0: #c2571a; --eval-1: #0b7a75; --eval-2: #8a1c8f;
  --eval-3: #7a6a00; --hover: #f0f3f9; }
@media (prefers-color-scheme: dark) { :root { --good: #7fdc9d; --bad: #ff9089; --accent: #7ea6f5; --eval-0: #f2a36b;
  --eval-1: #62cfc8; --eval-2: #e59bea; --eval-3: #d9c64f; --hover: #23272d; } }
h1 { margin: 0 0 .2rem; } h2 { border-top: 1px solid var(--line); padding-top: 1.2rem; } section { margin: 0; }
.lead { color: var(--faint); margin: 0 0 1rem; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
.says { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1.1rem .9rem 2rem;
  margin: .6rem 0; max-width: 62rem; } .says li { margin: .3rem 0; }
.alarm { border-left: 4px solid var(--bad); background: var(--panel); padding: .6rem .9rem; border-radius: 4px;
  margin: .6rem 0; }
.wide { border: 1px solid var(--line); border-radius: 8px; }
.figures { width: 100%; border-collapse: separate; border-spacing: 0; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
.figures th, .figures td { padding: .4rem .8rem; border-top: 1px solid var(--line); overflow-wrap: normal; }
.figures thead th { border-top: 0; background: var(--panel); vertical-align: bottom; white-space: nowrap; }
.figures th:first-child { position: sticky; left: 0; background: var(--back); color: var(--text); z-index: 1;
  max-width: 14rem; overflow-wrap: break-word; }
.figures thead th:first-child { background: var(--panel); }
.figures tbody tr:hover td, .figures tbody tr:hover th { background: var(--hover); }
.narrow { width: auto; } .figures .task { border-left: 1px solid var(--line); } .figures small {
  font-size: 12px; color: var(--faint);  font-weight: 400; display: block; }
.figures .n { text-align: right; } .figures b { font-weight: 650; }
.badge { display: inline-block; font-size: 11px; font-weight: 600; padding: 0 .45em; border-radius: 9px;
  border: 1px solid currentColor; margin-left: .3em; white-space: nowrap; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.panel { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; min-width: 0; }
.panel h3 { margin: 0 0 .4rem; } .panel p { margin: .1rem 0 .4rem; }
.row { display: grid; grid-template-columns: minmax(5rem, 9.5rem) 1fr 6.6rem; gap: .6rem; align-items: center;
  font-size: 13px; font-variant-numeric: tabular-nums; }
.row span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; } .row .n { text-align: right; }
.interval { width: 100%; height: 20px; display: block; overflow: visible; }
.scale { width: 100%; height: 14px; display: block; overflow: visible; }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
.whisker { stroke: var(--accent); stroke-width: 2.5; stroke-linecap: round; opacity: .55; }
.dot { fill: var(--accent); stroke: var(--back); stroke-width: 1; } .whisker.base { stroke: var(--faint); }
.dot.base { fill: var(--faint); } .ref { stroke: var(--faint); stroke-dasharray: 3 3; }
.dot.bad { fill: var(--bad); } .whisker.bad { stroke: var(--bad); }
.dot.good { fill: var(--good); } .whisker.good { stroke: var(--good); }
.plot { display: grid; grid-template-columns: minmax(0, 1.7fr) minmax(0, 1fr); gap: 1.5rem; align-items: start; }
.scatter { width: 100%; height: 24rem; display: block; overflow: visible; } .grid { stroke: var(--line); }
.leader { stroke: var(--faint); stroke-width: .7; }
.zero { stroke: var(--faint); stroke-width: 1.5; }
.point { fill: var(--accent); stroke: var(--back); stroke-width: 1.5; }
.point.prompt { fill: var(--eval-0); } .point.idle { fill: var(--bad); }
svg .number { fill: var(--text); font-weight: 600; } svg .axis, p.axis { fill: var(--faint); color: var(--faint);
  font-size: 12px; margin: 0 0 .3rem; }
.key { width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; } .key td, .key th { padding: 2px 8px 2px 0; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16.5rem), 1fr)); gap: .8rem; }
.many .panel { padding: .5rem .7rem .3rem; } .many h3 { font-size: 13px; margin: 0; }
.many p { font-size: 12px; margin: 0; }
.curves { width: 100%; height: 8.5rem; display: block; overflow: visible; }
.curve { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.train { stroke: var(--accent); } .eval.e0 { stroke: var(--eval-0); } .eval.e1 { stroke: var(--eval-1); }
.eval.e2 { stroke: var(--eval-2); } .eval.e3 { stroke: var(--eval-3); } .curve.eval { stroke-width: 1; opacity: .7; }
.mark.e0 { fill: var(--eval-0); } .mark.e1 { fill: var(--eval-1); } .mark.e2 { fill: var(--eval-2); }
.mark.e3 { fill: var(--eval-3); } .mark { stroke: none; }
.swatch { display: inline-block; width: 1.4em; height: 3px; vertical-align: middle; margin: 0 .3em 0 .9em; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .2rem .9rem; margin: .4rem 0; }
details > summary { color: var(--text); }
.flip { display: grid; grid-template-columns: 5rem 1.6fr 1fr 1fr 1fr; gap: .8rem; border-top: 1px solid var(--line);
  padding: .45rem 0; font-size: 13px; } .flip.head { border: 0; color: var(--faint); font-weight: 600; }
.flip > div { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; max-height: 12rem; overflow-y: auto; }
.flip label { display: none; color: var(--faint); font-weight: 600; }
h4 { margin: .8rem 0 .2rem; font-size: 13px; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; font-size: 12.5px;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 1rem; }
.facts th { white-space: nowrap; } .facts { margin: .2rem 0 1rem; }
@media (max-width: 760px) { body { padding: .9rem; } .plot { grid-template-columns: 1fr; gap: .6rem; }
  .scatter { height: 20rem; } .row { grid-template-columns: 6.2rem 1fr 5.9rem; gap: .4rem; font-size: 12.5px; }
  .flip { grid-template-columns: 1fr; gap: .25rem; } .flip.head { display: none; } .flip label { display: inline; }
  .figures th, .figures td { padding: .35rem .55rem; } .figures th:first-child { max-width: 8.5rem; }
  .many { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: .5rem; }
  .says { padding: .6rem .8rem .6rem 1.6rem; } }
@media print { .wide { overflow: visible; } details { break-inside: avoid; } }
"""
