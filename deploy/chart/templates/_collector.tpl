{{/* The collector's file, from the values. Its own package describes it. */}}
{{- define "outrigger.collectorConfig" -}}
{{- $v := .Values.collector }}
{{- $metrics := dict "host" $v.metrics.host "expose" ":15031" }}
{{- if $v.metrics.host }}{{ $_ := set $metrics "hostRoot" "/host" }}{{ end }}
{{- with $v.metrics.scrape }}{{ $_ := set $metrics "scrape" . }}{{ end }}
{{- with $v.metrics.outputs }}{{ $_ := set $metrics "outputs" . }}{{ end }}
{{- $config := dict "dataDir" $v.stateFolder "metrics" $metrics }}
{{- with .Values.clusterName }}{{ $_ := set $config "cluster" . }}{{ end }}
{{- if $v.logs.outputs }}
{{- $logs := dict "folder" $v.logs.folder "outputs" $v.logs.outputs }}
{{- with $v.logs.batch }}{{ $_ := set $logs "batch" . }}{{ end }}
{{- with $v.logs.inFlight }}{{ $_ := set $logs "inFlight" . }}{{ end }}
{{- $_ := set $config "logs" $logs }}
{{- end }}
{{- with $v.outputs }}{{ $_ := set $config "outputs" . }}{{ end }}
{{- toYaml $config }}
{{- end }}
