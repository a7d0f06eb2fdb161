package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// amount is what was written.
type amount struct{ bytes, lines int64 }

func folder(logs string, n int) string {
	return filepath.Join(logs, fmt.Sprintf("shop_orders-%d_%08x-0000-4000-8000-%012x", n, n, n), "app")
}

// appendLine appends a CRI line of some 200 bytes, as a program writes that logs
// plain text.
func appendLine(b []byte, at time.Time, n int64) []byte {
	b = at.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000000Z07:00")
	b = append(b, " stdout F INFO  [worker-"...)
	b = strconv.AppendInt(b, n%16, 10)
	b = append(b, "] com.example.shop.OrderService - order "...)
	b = strconv.AppendInt(b, 10_000_000+n*7919%80_000_000, 10)
	b = append(b, " of customer "...)
	b = strconv.AppendInt(b, 100_000+n*104_729%900_000, 10)
	b = append(b, " accepted, reserved in warehouse fra-"...)
	b = strconv.AppendInt(b, n%7, 10)
	b = append(b, " and handed to the carrier after "...)
	b = strconv.AppendInt(b, 10+n*31%90, 10)
	return append(b, " ms\n"...)
}

// writeAll writes about the bytes into the files of all containers.
func writeAll(logs string, bytes int64) (a amount, err error) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for c := range containers {
		if err := os.MkdirAll(folder(logs, c), 0o755); err != nil {
			return a, err
		}
		f, err := os.Create(filepath.Join(folder(logs, c), "0.log"))
		if err != nil {
			return a, err
		}
		out := bufio.NewWriterSize(f, 1<<20)
		var line []byte
		for size := int64(0); size < bytes/containers; size += int64(len(line)) {
			at = at.Add(1234567 * time.Nanosecond)
			line = appendLine(line[:0], at, a.lines)
			if _, err := out.Write(line); err != nil {
				return a, err
			}
			a.lines++
			a.bytes += int64(len(line))
		}
		if err := out.Flush(); err != nil {
			return a, err
		}
		if err := f.Close(); err != nil {
			return a, err
		}
	}
	return a, nil
}

// writePaced appends lines to the files of all containers at the pace, in bytes a
// second, for as long as the length.
func writePaced(ctx context.Context, logs string, pace int, length time.Duration) (a amount, err error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close() // what was written is there
		}
	}()
	for c := range containers {
		if err := os.MkdirAll(folder(logs, c), 0o755); err != nil {
			return a, err
		}
		f, err := os.OpenFile(filepath.Join(folder(logs, c), "0.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return a, err
		}
		files = append(files, f)
	}
	started := time.Now()
	var b []byte
	for elapsed := time.Duration(0); elapsed < length; elapsed = time.Since(started) {
		due := int64(elapsed.Seconds() * float64(pace))
		for n := 0; a.bytes < due; n++ {
			b = b[:0]
			for range 10 { // a runtime writes line by line; ten at once spare this program's processor
				b = appendLine(b, time.Now(), a.lines)
				a.lines++
			}
			if _, err := files[n%len(files)].Write(b); err != nil {
				return a, err
			}
			a.bytes += int64(len(b))
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return a, ctx.Err()
		}
	}
	return a, nil
}
