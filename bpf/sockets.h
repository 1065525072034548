/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Which of a listener's sockets a connection belongs to: the same in every hook.
 */
#ifndef RAMA_EBPF_SOCKETS_H
#define RAMA_EBPF_SOCKETS_H

/* The index in `sockets`, of a listener that has any. Spread by the source and its port, so that the ACK of a handshake
 * finds the socket that its SYN found. */
static __always_inline u32 socket_slot(const struct listener *listener, const struct packet *p)
{
	/* The upper bits of a product: the ports of one client are all odd or all even, as its stack picks them. */
	u32 flow = (mapped_ipv4(&p->source) * 0x85ebca6bu ^ p->source_port) * 0x9e3779b1u >> 16;

	return listener->id * SOCKETS_PER_LISTENER + flow % listener->sockets;
}

/* The destructor of what is looked up in `sockets`. */
static __always_inline void release(struct bpf_sock **sk)
{
	if (*sk)
		bpf_sk_release(*sk);
}

#endif
