/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * What the wire relay's programs share with userspace; rama_ebpf/kernel/wire.py reads this file. Host byte order, but for
 * addresses and ports, which are as they are on the wire.
 *
 * A tunnel is a pair of legs: leg 0 is the client's, leg 1 the target's. Each leg has an entry in `flows`, under the
 * addresses of what arrives from that end.
 */
#ifndef RAMA_EBPF_WIRE_H
#define RAMA_EBPF_WIRE_H

/* Bits of a pair's state. Changed by compare-and-swap, or set for good by an atomic or. */
enum wire_state {
	WIRE_TRACK = 1,     /* its packets go to the stack, and are watched */
	WIRE_GO = 2,        /* the proxy is done with both sockets: it may be taken over */
	WIRE_ACKED0 = 4,    /* the client has acknowledged all that the proxy has sent and will send */
	WIRE_ACKED1 = 8,    /* likewise the target */
	WIRE_SPOILED = 16,  /* something came that the proxy's sockets have to see: it is never taken over */
	WIRE_TAKEN = 32,    /* its packets are translated */
	WIRE_FIN0 = 64,     /* the client has ended its stream */
	WIRE_FIN1 = 128,
	WIRE_FINACK0 = 256, /* the client has acknowledged the target's end */
	WIRE_FINACK1 = 512,
	WIRE_RESET0 = 1024, /* the client has reset the connection */
	WIRE_RESET1 = 2048,
	WIRE_DEAD = 4096,   /* its ports belong to a new connection: its packets go to the stack */
};

/* Why userspace is given the headers of a packet. */
enum wire_why {
	NOTICE_TOO_BIG = 1, /* it does not fit the other leg's device: its sender has to be told */
	NOTICE_ERROR = 2,   /* an ICMP error came about a packet that was translated */
};

enum wire_mark {
	WIRE_OWN_MARK = 0x77697265, /* of packets by which the relay speaks to its own parked sockets: "wire" */
};

enum wire_size {
	WIRE_NOTICE_BYTES = 56, /* of an ICMP header and the packet that it quotes */
};

struct wire_key {
	__u32 source[4];
	__u32 target[4];
	__u16 sport;
	__u16 dport;
};

struct wire_flow {
	__u32 pair;
	__u32 leg;
	__u32 source[4]; /* what the packet's addresses become */
	__u32 target[4];
	__u16 sport;
	__u16 dport;
	__u32 seq;    /* added to the sequence number */
	__u32 ack;    /* added to the acknowledgement, and to the edges of SACK blocks */
	__u32 device; /* where it goes out */
	__u32 expect_received; /* until it is taken over: the sequence number that comes next */
	__u32 expect_acked;    /* the acknowledgement of all that the proxy sends */
	__u8 shift_left;  /* the window's scale on this leg, less that of the other */
	__u8 shift_right;
	__u8 v6;
	__u8 scale; /* of the windows that this leg's end advertises */
};

struct wire_leg {
	__u64 packets;
	__u64 bytes;  /* that this end has sent and the other has acknowledged; the end of the stream counts as one */
	__u64 seen;   /* when the last packet came, CLOCK_MONOTONIC ns */
	/* Sequence numbers, in words that can be compared and swapped: packets of one end may come on several CPUs. */
	__u64 acked;  /* the highest acknowledgement that this end has sent, of what the other had sent */
	__u64 sent;   /* behind the last byte that it has sent within the other's window */
	__u32 end;    /* behind its FIN */
	__u32 window; /* bytes that this end takes behind `acked` */
};

struct wire_pair {
	__u64 state;
	__u64 taken_at; /* CLOCK_MONOTONIC ns */
	__u32 spoiled_by; /* leg << 8 and the TCP flags */
	__u32 pad;
	__u32 stamps[2];  /* added to the timestamps of a leg; subtracted from the echoes of the other */
	__u32 offsets[2]; /* of the proxy's own timestamps on a leg */
	__u32 recent[2];  /* the last timestamp that came on a leg */
	struct wire_leg legs[2];
};

/* What `wire_snapshot` is asked: behind the 14 bytes of a frame's header, and answered in place. */
struct wire_question {
	__u32 v6;
	__u32 pad;
	struct wire_key key;
};

struct wire_snapshot {
	__u32 found;
	__u32 state;
	__u32 rcv_nxt;
	__u32 copied_seq;
	__u32 snd_una;
	__u32 snd_nxt;
	__u32 write_seq;
	__u32 ts_recent;
	__u32 tsoffset;
	__u32 out_of_order;
	__u32 backlog;
	__u32 snd_wnd;
	__u32 rcv_wnd;
	__u32 rcv_wup;
	__u32 device; /* by which it sends; 0 if it has no route yet */
};

/* What `wire_flip` is asked: set bits of a pair's state unless one of others is set, or it is later than `deadline`. */
struct wire_flip {
	__u64 deadline; /* CLOCK_MONOTONIC ns; 0 for none */
	__u64 unless;
	__u64 bits;
	__u32 pair;
	__u32 pad;
};

struct wire_notice {
	__u32 pair;
	__u8 leg; /* on which it came */
	__u8 kind; /* enum wire_why */
	__u8 v6;
	__u8 pad;
	__u8 bytes[WIRE_NOTICE_BYTES];
};

#endif
