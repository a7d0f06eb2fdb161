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
{{- with $v.logs.linkedFolders }}{{ $_ := set $logs "linkedFolders" . }}{{ end }}
{{- if $v.logs.spool }}{{ $_ := set $logs "spool" (print (dir $v.logs.folder) "/outrigger") }}{{ end }}
{{- with $v.logs.spoolBytes }}{{ $_ := set $logs "spoolBytes" (int64 .) }}{{ end }}
{{- with $v.logs.inputs }}{{ $_ := set $logs "inputs" . }}{{ end }}
{{- with $v.logs.rules }}{{ $_ := set $logs "rules" . }}{{ end }}
{{- with $v.logs.quotas }}{{ $_ := set $logs "quotas" . }}{{ end }}
{{- with $v.logs.batch }}{{ $_ := set $logs "batch" . }}{{ end }}
{{- with $v.logs.inFlight }}{{ $_ := set $logs "inFlight" . }}{{ end }}
{{- $_ := set $config "logs" $logs }}
{{- if $v.kubernetes.watch }}
{{- $kubernetes := dict "watch" true }}
{{- with $v.kubernetes.kubelet }}
{{- $_ := set $kubernetes "kubelet" "https://$(NODE_IP):10250" }}
{{- if eq . "insecure" }}{{ $_ := set $kubernetes "kubeletInsecure" true }}{{ else }}{{ $_ := set $kubernetes "kubeletCAFile" "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt" }}{{ end }}
{{- end }}
{{- $_ := set $config "kubernetes" $kubernetes }}
{{- end }}
{{- end }}
{{- with $v.outputs }}{{ $_ := set $config "outputs" . }}{{ end }}
{{- toYaml $config }}
{{- end }}
