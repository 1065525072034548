/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The backstop of the egress policy: the services check the address that they dial or send to and say no in their
 * protocol's words; this refuses (EPERM) what was tried in any other way. Its meaning is that of
 * rama_ebpf/policy/egress.py: the longest prefix decides, and an address that embeds an IPv4 address is judged as both.
 * Streams to the proxy's own listeners are refused whatever the prefix says: they would go round in circles.
 *
 * A child that reads a feed is in a cgroup of its own below the workers', and goes where it was granted to, nowhere else.
 *
 * connect4 and connect6 judge every connect(2), sendmsg4 and sendmsg6 every datagram that names its target. The process
 * is what counts, not whose socket it is: a listener was made by the server, but a worker can turn it, and whatever it
 * has accepted, into a new connection (connect(2) to AF_UNSPEC, and again).
 *
 * A datagram socket may answer: egress_note_peer, cgroup_skb ingress on the workers' cgroup, keeps who has sent to which
 * socket from where policy lets nothing be sent to. Without it a client of UDP ASSOCIATE on a private network would get
 * no answer. Who sends is believed as far as the network is; the workers themselves are not: egress_setsockopt denies
 * them the option with which they could send to themselves from an address that is not this host's.
 */

#define EGRESS_REFUSE 0
#define EGRESS_ALLOW 1
#define SOCK_DGRAM_TYPE 2
#define DNS_PORT 53
/* From linux/in.h and linux/in6.h, and the levels from the libc's headers. */
#define SOL_IP_LEVEL 0
#define SOL_IPV6_LEVEL 41
#define MPTCP_PROTOCOL 262
#ifndef IP_FREEBIND
#define IP_FREEBIND 15
#endif
#ifndef IPV6_FREEBIND
#define IPV6_FREEBIND 78
#endif

/* Whether a stream to there comes back to the proxy: to an address of a listener, to a binding, or to its family's
 * wildcard. */
static __always_inline int is_own_listener(const struct address *target, u16 port)
{
	struct packet p = {};
	struct listener found;
	u32 wildcard;

	p.target = *target;
	p.port = port;
	return find_listener(&p, &found, &wildcard);
}

static __always_inline int is_denied(const struct address *target, u16 port, int stream)
{
	struct failsafe_key key = { .plen = 32 + 128, .ipv4 = is_mapped(target), .addr = *target };
	u32 *found = egress.lookup(&key);

	if (!found)
		return 0;
	if (stream && *found & EGRESS_OWN && is_own_listener(target, port))
		return 1;
	return *found & EGRESS_DENY && !(*found & EGRESS_NAMESERVER && port == DNS_PORT);
}

static __always_inline int is_nameserver(const struct address *target, u16 port)
{
	struct failsafe_key key = { .plen = 32 + 128, .ipv4 = is_mapped(target), .addr = *target };
	u32 *found = port == DNS_PORT ? egress.lookup(&key) : 0;

	return found && *found & EGRESS_NAMESERVER;
}

static __always_inline int policy_refuses(const struct address *target, u16 port, int stream)
{
	struct address inner;
	u32 third, last, six_to_four, ip;
	u64 first = bpf_ntohll(target->half[0]);

	if (is_denied(target, port, stream))
		return 1;
	__builtin_memcpy(&third, target->b + 8, 4);
	__builtin_memcpy(&last, target->b + 12, 4);
	__builtin_memcpy(&six_to_four, target->b + 2, 4);
	/* or else clang computes the address to read from */
	asm volatile("" : "+r"(third), "+r"(last), "+r"(six_to_four));
	third = bpf_ntohl(third);
	if (first >> 48 == 0x2002)
		ip = six_to_four; /* RFC 3056 */
	else if (first >> 32 == 0x20010000)
		ip = ~last; /* Teredo's client, RFC 4380 */
	else if ((first == 0x0064ff9b00000000ull && !third) || /* NAT64, RFC 6052 */
		 first >> 16 == 0x0064ff9b0001ull || /* RFC 8215 */
		 (!first && third == 0xffff0000) || /* SIIT, RFC 2765 */
		 (!first && !third && bpf_ntohl(last) > 1) || /* IPv4-compatible */
		 third == 0x00005efe || third == 0x02005efe) /* ISATAP, RFC 5214 */
		ip = last;
	else
		return 0;
	map_ipv4(&inner, ip);
	return is_denied(&inner, port, stream);
}

/* The server itself. */
static __always_inline int is_server(void)
{
	u32 zero = 0;
	u64 *server = server_cgroup.lookup(&zero);

	return server && *server == bpf_get_current_cgroup_id();
}

static __always_inline int judge_target(struct bpf_sock_addr *ctx, const struct address *target)
{
	struct peer_key peer = { .addr = *target, .port = bpf_ntohs(ctx->user_port) };
	struct grant_key grant = { .cgroup = bpf_get_current_cgroup_id() };

	if (grants.lookup(&grant)) {
		if (is_nameserver(target, peer.port))
			return EGRESS_ALLOW;
		grant.addr = *target;
		grant.port = peer.port;
		return grants.lookup(&grant) ? EGRESS_ALLOW : EGRESS_REFUSE;
	}
	if (!policy_refuses(target, peer.port, ctx->type != SOCK_DGRAM_TYPE) || is_server())
		return EGRESS_ALLOW;
	if (ctx->type != SOCK_DGRAM_TYPE)
		return EGRESS_REFUSE;
	peer.socket = bpf_get_socket_cookie(ctx);
	return datagram_peers.lookup(&peer) ? EGRESS_ALLOW : EGRESS_REFUSE;
}

static __always_inline int judge_context4(struct bpf_sock_addr *ctx)
{
	struct address target;

	map_ipv4(&target, ctx->user_ip4);
	return judge_target(ctx, &target);
}

static __always_inline int judge_context6(struct bpf_sock_addr *ctx)
{
	u32 words[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	struct address target;

	__builtin_memcpy(&target, words, 16);
	return judge_target(ctx, &target);
}

int egress_connect4(struct bpf_sock_addr *ctx)
{
	return judge_context4(ctx);
}

int egress_connect6(struct bpf_sock_addr *ctx)
{
	return judge_context6(ctx);
}

/* Also for an IPv6 socket that sends to an IPv4-mapped address. */
int egress_sendmsg4(struct bpf_sock_addr *ctx)
{
	return judge_context4(ctx);
}

int egress_sendmsg6(struct bpf_sock_addr *ctx)
{
	return judge_context6(ctx);
}

int egress_note_peer(struct __sk_buff *skb)
{
	struct peer_key peer = {};
	struct bpf_sock *sk = skb->sk;
	void *at = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct udphdr *udp;
	u32 heard = 1;

	if (!sk)
		return CGROUP_PASS;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->protocol != IPPROTO_UDP)
		return CGROUP_PASS;

	/* Fragments are put together by now. Behind IPv6 extension headers nothing is looked for: no answer goes there. */
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = at;

		if ((void *)(ip + 1) > end || ip->protocol != IPPROTO_UDP || ip->ihl < 5)
			return CGROUP_PASS;
		map_ipv4(&peer.addr, ip->saddr);
		udp = at + ip->ihl * 4;
	} else {
		struct ipv6hdr *ip = at;

		if ((void *)(ip + 1) > end || ip->nexthdr != IPPROTO_UDP)
			return CGROUP_PASS;
		__builtin_memcpy(&peer.addr, &ip->saddr, 16);
		udp = (void *)(ip + 1);
	}
	if ((void *)(udp + 1) > end)
		return CGROUP_PASS;
	peer.port = bpf_ntohs(udp->source);
	if (!policy_refuses(&peer.addr, peer.port, 0))
		return CGROUP_PASS;
	peer.socket = bpf_get_socket_cookie(skb);
	if (!datagram_peers.lookup(&peer))
		datagram_peers.update(&peer, &heard);
	return CGROUP_PASS;
}

/* No sockets of protocols whose addresses nothing here judges: ICMP, raw, SCTP, DCCP, L2TP, and UDP-Lite, whose connect(2)
 * asks no hook. */
int egress_socket(struct bpf_sock *ctx)
{
	u32 protocol = ctx->protocol;

	return protocol == IPPROTO_TCP || protocol == MPTCP_PROTOCOL || protocol == IPPROTO_UDP;
}

int egress_setsockopt(struct bpf_sockopt *ctx)
{
	s32 level = ctx->level, name = ctx->optname;

	ctx->optlen = 0; /* nothing was changed: the kernel takes what the process passed, however long */
	return !((level == SOL_IP_LEVEL && name == IP_FREEBIND) || (level == SOL_IPV6_LEVEL && name == IPV6_FREEBIND));
}
