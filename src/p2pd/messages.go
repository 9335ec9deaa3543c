package main

// The messages of the control socket and of unary calls between peers, encoded and decoded by hand: they are few and
// small, and a decoder that returns slices of its input lets a payload pass through without being copied.

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Values of Request.type.
const (
	reqIdentify            = 0
	reqConnect             = 1
	reqStreamOpen          = 2
	reqStreamHandler       = 3
	reqDHT                 = 4
	reqListPeers           = 5
	reqConnManager         = 6
	reqDisconnect          = 7
	reqPubsub              = 8
	reqPersistentUpgrade   = 9
	reqRemoveStreamHandler = 10
)

// Values of DHTRequest.type that this daemon answers, and the last one that exists.
const (
	dhtFindPeer        = 0
	dhtGetClosestPeers = 3
	dhtLastType        = 8
)

// Values of DHTResponse.type.
const (
	dhtBegin = 0
	dhtValue = 1
	dhtEnd   = 2
)

// Field numbers of the oneof in PersistentConnectionRequest (from clients, and between peers).
const (
	fieldAddUnaryHandler    = 2
	fieldCallUnary          = 3
	fieldUnaryResponse      = 4
	fieldCancelRequest      = 5
	fieldRemoveUnaryHandler = 6
)

// Field numbers of the oneof in PersistentConnectionResponse (to clients).
const (
	fieldCallUnaryResponse = 2
	fieldRequestHandling   = 3
	fieldDaemonError       = 4
	fieldCancelResponse    = 5
)

var (
	errMissingField = errors.New("a required field is missing")
	errUnknownType  = errors.New("unknown message type")
)

type peerAddrs struct {
	id    []byte
	addrs [][]byte
}

// peerRequest holds the parameters of CONNECT, STREAM_OPEN and DISCONNECT; each uses a subset.
type peerRequest struct {
	peer    []byte
	addrs   [][]byte
	protos  []string
	timeout int64
}

// handlerRequest holds the parameters of STREAM_HANDLER and REMOVE_STREAM_HANDLER.
type handlerRequest struct {
	addr     []byte
	protos   []string
	balanced bool
}

type dhtRequest struct {
	kind    int32
	peer    []byte
	key     []byte
	timeout int64
}

type request struct {
	kind                int32
	connect             *peerRequest
	streamOpen          *peerRequest
	disconnect          *peerRequest
	streamHandler       *handlerRequest
	removeStreamHandler *handlerRequest
	dht                 *dhtRequest
	hasConnManager      bool
	hasPubsub           bool
}

// value is one field's content: varint or bytes, by its wire type.
type value struct {
	typ    protowire.Type
	varint uint64
	bytes  []byte
}

func (v value) isVarint() bool { return v.typ == protowire.VarintType }
func (v value) isBytes() bool  { return v.typ == protowire.BytesType }

// walk calls visit for every field of a message. A known field with an unexpected wire type is for visit to ignore,
// as protobuf implementations do.
func walk(b []byte, visit func(protowire.Number, value) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		v := value{typ: typ}
		switch typ {
		case protowire.VarintType:
			v.varint, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			v.bytes, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := visit(num, v); err != nil {
			return err
		}
	}
	return nil
}

func parseRequest(b []byte) (*request, error) {
	r := &request{kind: -1}
	err := walk(b, func(num protowire.Number, v value) (err error) {
		if num == 1 && v.isVarint() {
			r.kind = int32(v.varint)
			return nil
		}
		if !v.isBytes() {
			return nil
		}
		switch num {
		case 2:
			r.connect, err = parsePeerRequest(v.bytes, connectFields)
		case 3:
			r.streamOpen, err = parsePeerRequest(v.bytes, streamOpenFields)
		case 4:
			r.streamHandler, err = parseHandlerRequest(v.bytes, true)
		case 5:
			r.dht, err = parseDHTRequest(v.bytes)
		case 6:
			r.hasConnManager = true
			err = requireVarint(v.bytes, 1)
		case 7:
			r.disconnect, err = parsePeerRequest(v.bytes, disconnectFields)
		case 8:
			r.hasPubsub = true
			err = requireVarint(v.bytes, 1)
		case 9:
			r.removeStreamHandler, err = parseHandlerRequest(v.bytes, false)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if r.kind < reqIdentify || r.kind > reqRemoveStreamHandler {
		return nil, errUnknownType
	}
	return r, nil
}

// peerFields says which field number of a message holds what; 0 stands for "not there".
type peerFields struct{ addrs, protos, timeout protowire.Number }

var (
	connectFields    = peerFields{addrs: 2, timeout: 3}
	streamOpenFields = peerFields{protos: 2, timeout: 3}
	disconnectFields = peerFields{}
)

func parsePeerRequest(b []byte, fields peerFields) (*peerRequest, error) {
	r := &peerRequest{}
	found := false
	err := walk(b, func(num protowire.Number, v value) error {
		switch {
		case num == 1 && v.isBytes():
			r.peer, found = v.bytes, true
		case num == fields.addrs && v.isBytes():
			r.addrs = append(r.addrs, v.bytes)
		case num == fields.protos && v.isBytes():
			r.protos = append(r.protos, string(v.bytes))
		case num == fields.timeout && v.isVarint():
			r.timeout = int64(v.varint)
		}
		return nil
	})
	if err == nil && !found {
		err = errMissingField
	}
	return r, err
}

func parseHandlerRequest(b []byte, needBalanced bool) (*handlerRequest, error) {
	r := &handlerRequest{}
	hasAddr, hasBalanced := false, false
	err := walk(b, func(num protowire.Number, v value) error {
		switch {
		case num == 1 && v.isBytes():
			r.addr, hasAddr = v.bytes, true
		case num == 2 && v.isBytes():
			r.protos = append(r.protos, string(v.bytes))
		case num == 3 && v.isVarint():
			r.balanced, hasBalanced = protowire.DecodeBool(v.varint), true
		}
		return nil
	})
	if err == nil && (!hasAddr || needBalanced && !hasBalanced) {
		err = errMissingField
	}
	return r, err
}

func parseDHTRequest(b []byte) (*dhtRequest, error) {
	r := &dhtRequest{kind: -1}
	err := walk(b, func(num protowire.Number, v value) error {
		switch {
		case num == 1 && v.isVarint():
			r.kind = int32(v.varint)
		case num == 2 && v.isBytes():
			r.peer = v.bytes
		case num == 4 && v.isBytes():
			r.key = v.bytes
		case num == 7 && v.isVarint():
			r.timeout = int64(v.varint)
		}
		return nil
	})
	if err == nil && (r.kind < 0 || r.kind > dhtLastType) {
		err = errUnknownType
	}
	return r, err
}

// requireVarint checks a message of which nothing but the presence of one required enum matters here.
func requireVarint(b []byte, field protowire.Number) error {
	found := false
	err := walk(b, func(num protowire.Number, v value) error {
		found = found || num == field && v.isVarint()
		return nil
	})
	if err == nil && !found {
		err = errMissingField
	}
	return err
}

// callID names a call on a persistent connection.
type callID [16]byte

// unaryCall is a CallUnaryRequest: a call from a client, on the wire, or handed to a handler.
type unaryCall struct {
	peer  []byte
	proto string
	data  []byte
}

// handlerName is an AddUnaryHandlerRequest or a RemoveUnaryHandlerRequest.
type handlerName struct {
	proto    string
	balanced bool
}

// persistentRequest is a PersistentConnectionRequest. kind is the field number of the oneof, 0 when it is empty.
type persistentRequest struct {
	id      callID
	validID bool
	kind    protowire.Number
	call    unaryCall   // kind == fieldCallUnary
	handler handlerName // kind == fieldAddUnaryHandler, fieldRemoveUnaryHandler
	answer  []byte      // kind == fieldUnaryResponse: an encoded CallUnaryResponse
}

// parsePersistentRequest decodes without copying payloads: call.data and answer are parts of b. An ID that is not 16
// bytes long is no error, the message is just not for anyone (validID is false).
func parsePersistentRequest(b []byte) (persistentRequest, error) {
	var r persistentRequest
	hasID := false
	err := walk(b, func(num protowire.Number, v value) (err error) {
		if !v.isBytes() {
			return nil
		}
		switch num {
		case 1:
			hasID = true
			r.validID = len(v.bytes) == len(r.id)
			copy(r.id[:], v.bytes)
			return nil
		case fieldAddUnaryHandler:
			r.handler, err = parseHandlerName(v.bytes, true)
		case fieldRemoveUnaryHandler:
			r.handler, err = parseHandlerName(v.bytes, false)
		case fieldCallUnary:
			r.call, err = parseUnaryCall(v.bytes)
		case fieldUnaryResponse:
			r.answer = v.bytes
			err = walk(v.bytes, func(protowire.Number, value) error { return nil })
		case fieldCancelRequest:
		default:
			return nil
		}
		r.kind = num
		return err
	})
	if err == nil && !hasID {
		err = errMissingField
	}
	return r, err
}

func parseHandlerName(b []byte, needBalanced bool) (handlerName, error) {
	var h handlerName
	hasProto, hasBalanced := false, false
	err := walk(b, func(num protowire.Number, v value) error {
		switch {
		case num == 1 && v.isBytes():
			h.proto, hasProto = string(v.bytes), true
		case num == 2 && v.isVarint():
			h.balanced, hasBalanced = protowire.DecodeBool(v.varint), true
		}
		return nil
	})
	if err == nil && (!hasProto || needBalanced && !hasBalanced) {
		err = errMissingField
	}
	return h, err
}

func parseUnaryCall(b []byte) (unaryCall, error) {
	var c unaryCall
	seen := 0
	err := walk(b, func(num protowire.Number, v value) error {
		if !v.isBytes() {
			return nil
		}
		switch num {
		case 1:
			c.peer, seen = v.bytes, seen|1
		case 2:
			c.proto, seen = string(v.bytes), seen|2
		case 3:
			c.data, seen = v.bytes, seen|4
		}
		return nil
	})
	if err == nil && seen != 7 {
		err = errMissingField
	}
	return c, err
}

func appendBytes(b []byte, num protowire.Number, content []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, num, protowire.BytesType), content)
}

func appendString(b []byte, num protowire.Number, content string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), content)
}

func appendEnum(b []byte, num protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), v)
}

// okResponse is a Response of type OK, to which fields may be appended.
func okResponse() []byte { return appendEnum(nil, 1, 0) }

func errorResponse(err error) []byte {
	return appendBytes(appendEnum(nil, 1, 1), 2, appendString(nil, 1, err.Error()))
}

func encodePeerAddrs(p peerAddrs) []byte {
	b := appendBytes(nil, 1, p.id)
	for _, a := range p.addrs {
		b = appendBytes(b, 2, a)
	}
	return b
}

func encodeStreamInfo(peer, addr []byte, proto string) []byte {
	return appendString(appendBytes(appendBytes(nil, 1, peer), 2, addr), 3, proto)
}

// encodeDHTResponse makes a DHTResponse; peer and value may be nil.
func encodeDHTResponse(kind uint64, peer *peerAddrs, value []byte) []byte {
	b := appendEnum(nil, 1, kind)
	if peer != nil {
		b = appendBytes(b, 2, encodePeerAddrs(*peer))
	}
	if value != nil {
		b = appendBytes(b, 3, value)
	}
	return b
}

// persistentResponse makes a PersistentConnectionResponse whose oneof field has the given content; field 0 leaves the
// oneof empty, which means "done".
func persistentResponse(id callID, field protowire.Number, content []byte) []byte {
	b := appendBytes(make([]byte, 0, 24+len(content)), 1, id[:])
	if field == 0 {
		return b
	}
	return appendBytes(b, field, content)
}

func daemonError(id callID, err error) []byte {
	return persistentResponse(id, fieldDaemonError, appendString(nil, 1, err.Error()))
}

// answerHead is everything of a PersistentConnectionResponse{callUnaryResponse} but the encoded answer itself, which
// must follow on the wire.
func answerHead(id callID, answerLen int) []byte {
	b := appendBytes(make([]byte, 0, 32), 1, id[:])
	return protowire.AppendVarint(protowire.AppendTag(b, fieldCallUnaryResponse, protowire.BytesType), uint64(answerLen))
}

// handlingHead is everything of a PersistentConnectionResponse{requestHandling} but the payload itself, which must
// follow on the wire.
func handlingHead(id callID, peer []byte, proto string, dataLen int) []byte {
	inner := appendString(appendBytes(make([]byte, 0, 128), 1, peer), 2, proto)
	inner = protowire.AppendVarint(protowire.AppendTag(inner, 3, protowire.BytesType), uint64(dataLen))
	b := appendBytes(make([]byte, 0, len(inner)+32), 1, id[:])
	b = protowire.AppendVarint(protowire.AppendTag(b, fieldRequestHandling, protowire.BytesType), uint64(len(inner)+dataLen))
	return append(b, inner...)
}

// parseAnswer takes the encoded CallUnaryResponse out of a frame that a peer sent as its answer.
func parseAnswer(b []byte) ([]byte, error) {
	r, err := parsePersistentRequest(b)
	if err != nil {
		return nil, fmt.Errorf("the peer's answer cannot be read: %w", err)
	}
	if r.kind != fieldUnaryResponse {
		return nil, errors.New("the peer's answer is not a unary response")
	}
	return r.answer, nil
}
