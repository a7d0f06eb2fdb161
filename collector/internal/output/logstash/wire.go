package logstash

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The frames of lumberjack, version 2. Numbers are big-endian.
//
//	2W <count>            how many events come next
//	2J <seq> <len> <doc>  an event; seq counts from 1 in its window
//	2C <len> <zlib>       frames, compressed
//	2A <seq>              from the server: events up to seq are taken
const (
	frameHead   = 2
	ackLen      = frameHead + 4
	documentLen = frameHead + 8 // before the document
)

func appendWindow(b []byte, count int) []byte {
	return binary.BigEndian.AppendUint32(append(b, '2', 'W'), uint32(count))
}

// beginDocument appends the head of an event, whose length endDocument fills in.
func beginDocument(b []byte, seq int) []byte {
	b = binary.BigEndian.AppendUint32(append(b, '2', 'J'), uint32(seq))
	return append(b, 0, 0, 0, 0)
}

// endDocument completes the event that begins at start.
func endDocument(b []byte, start int) {
	binary.BigEndian.PutUint32(b[start+documentLen-4:], uint32(len(b)-start-documentLen))
}

// readAck reads one acknowledgement.
func readAck(r io.Reader) (seq uint32, err error) {
	var frame [ackLen]byte
	if _, err := io.ReadFull(r, frame[:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the server closed the connection (it does so too when it expects TLS and tls is not set): %w", err)
		}
		return 0, err
	}
	if frame[0] == 0x15 && frame[1] == 3 { // an alert
		return 0, permanentError{errors.New("the server speaks TLS: set tls")}
	}
	if frame[0] != '2' || frame[1] != 'A' {
		return 0, fmt.Errorf("the server answers %q, which is no acknowledgement of lumberjack 2: is this Logstash's beats input?", frame[:frameHead])
	}
	return binary.BigEndian.Uint32(frame[frameHead:]), nil
}
