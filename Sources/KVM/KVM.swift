// The KVM room.
