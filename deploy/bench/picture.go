package main

import (
	"fmt"
	"html"
	"strings"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// Sizes of the picture, in its own units.
const (
	pictureWidth = 760
	barLeft      = 170
	barMost      = 480 // length of the longest bar of a scenario
	barHeight    = 14
	barStep      = 20
	blockHead    = 34
	blockGap     = 18
	pictureTop   = 64
)

// picture draws the CPU a request of every peer relative to that of the relay,
// a block a scenario. It follows the reader's light or dark scheme.
func picture(p plan, all results) string {
	var b strings.Builder
	y := pictureTop
	text := func(class string, x, y int, s string) {
		fmt.Fprintf(&b, "<text class=%q x=\"%d\" y=\"%d\">%s</text>\n", class, x, y, html.EscapeString(s))
	}
	for _, s := range p.scenarios {
		figs := all[s.name]
		relay := figs["relay"]
		if relay == nil || relay.failed != "" || len(relay.cpu) == 0 {
			continue
		}
		longest := 1.0
		for _, o := range p.peers {
			if f := figs[o.name]; o.name != "direct" && f.failed == "" {
				ratio, _, most := measure.Ratio(f.cpu, relay.cpu)
				longest = max(longest, ratio, most)
			}
		}
		length := func(ratio float64) int { return int(ratio / longest * barMost) }
		text("title", 16, y+16, s.title)
		y += blockHead
		top := y
		for _, o := range p.peers {
			f := figs[o.name]
			if o.name == "direct" {
				continue
			}
			class := "them"
			if o.name == "ours" {
				class = "ours"
			}
			text("name "+class+"-name", barLeft-8, y+barHeight-3, o.title)
			if f.failed != "" {
				text("none", barLeft+6, y+barHeight-3, "no figures")
				y += barStep
				continue
			}
			ratio, least, most := measure.Ratio(f.cpu, relay.cpu)
			fmt.Fprintf(&b, "<rect class=%q x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" rx=\"2\"/>\n", class, barLeft, y, max(length(ratio), 1), barHeight)
			if most > least {
				fmt.Fprintf(&b, "<path class=\"spread\" d=\"M%d %dH%d\"/>\n", barLeft+length(least), y+barHeight/2, barLeft+length(most))
			}
			text("value", barLeft+max(length(ratio), length(most))+8, y+barHeight-3, fmt.Sprintf("%.2f", ratio))
			y += barStep
		}
		fmt.Fprintf(&b, "<path class=\"one\" d=\"M%d %dV%d\"/>\n", barLeft+length(1), top-4, y-barStep+barHeight+4)
		y += blockGap
	}
	var out strings.Builder
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="CPU time a request of proxies, relative to a raw TCP relay">
<style>
svg { background: #ffffff }
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
.heading { font-size: 16px; font-weight: 600 }
.title { font-size: 13px; font-weight: 600 }
.note, .none { fill: #6e7781 }
.name { text-anchor: end }
.ours-name { font-weight: 600 }
.value { font-variant-numeric: tabular-nums }
.them { fill: #afb8c1 }
text.them-name { fill: #24292f }
.ours { fill: #0969da }
.spread { stroke: #57606a; stroke-width: 1.5 }
.one { stroke: #57606a; stroke-width: 1; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
svg { background: #0d1117 }
text, text.them-name { fill: #e6edf3 }
.note, .none { fill: #8b949e }
.them { fill: #484f58 }
.ours { fill: #2f81f7 }
.spread, .one { stroke: #9da7b3 }
}
</style>
<text class="heading" x="16" y="28">CPU time a request, relative to a raw TCP relay</text>
<text class="note" x="16" y="48">Shorter is better. Dashed: the relay, 1. Thin lines: smallest to largest ratio of a round. Each block has a scale of its own.</text>
`, pictureWidth, y, pictureWidth, y)
	out.WriteString(b.String())
	out.WriteString("</svg>\n")
	return out.String()
}
