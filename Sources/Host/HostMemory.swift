import Glibc

/// The memory of this host.
public enum HostMemory {
    /// Physical memory in bytes.
    public static let byteCount = UInt64(sysconf(Int32(_SC_PHYS_PAGES))) * UInt64(sysconf(Int32(_SC_PAGESIZE)))
}
